"""From a run directory to files that others load: no launcher, no GPU, one file in memory at a time.

A trained model becomes a checkpoint for transformers; a LoRA run an adapter for PEFT or vLLM, or, merged, a checkpoint
too. The training state is in logical tensors, so a single process can put transformers' tensors together whatever
topology trained them. What was not trained (vision tower, layer scalars, frozen parts) is copied bit for bit from the
model that the run started from. A directory appears whole or not at all.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from ds_dgemma.checkpoint.adapter import CONFIG as ADAPTER_CONFIG
from ds_dgemma.checkpoint.adapter import AdapterReader
from ds_dgemma.checkpoint.adapter_export import AdapterFormat, write_adapter
from ds_dgemma.checkpoint.merge import Merged
from ds_dgemma.checkpoint.names import ENCODER_LAYERS, adapter_state_name, sources_of
from ds_dgemma.checkpoint.run_state import StateReader, newest, open_checkpoint, step_directory
from ds_dgemma.checkpoint.weights import INDEX, SINGLE, WeightReader, local_directory
from ds_dgemma.config import LoraSection
from ds_dgemma.errors import UserError
from ds_dgemma.model.build import build_stack
from ds_dgemma.model.lora import Factor, Target, possible_targets, scaling
from ds_dgemma.model.spec import read_spec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Format = Literal[AdapterFormat, "merged"]

# (name, value in the model that was started from) -> what it became; None: it stayed
Change = Callable[[str, Tensor], Tensor | None]


@dataclass(frozen=True)
class Run:
    """What there is to export."""

    base: str  # the model that it started from, as its config says it
    model: Path  # where that lies
    lora: LoraSection | None
    trained: StateReader


def export_run(
    run_dir: Path, out: Path, step: int | None = None, dtype: str = "auto", form: Format | None = None
) -> Path:
    """Write a run's checkpoint (the newest, or of `step`) as `form` says; return `out`.

    `form` None is an adapter for PEFT after a LoRA run, else, as always with merged, a transformers directory. `dtype`
    auto keeps every tensor's type in the model that the run started from; an adapter's are the fp32 that was trained.

    Raises:
        UserError: no such run or checkpoint, no adapter to write, an `out` that holds something else, or a disk that
        refuses.
    """
    run = _open(run_dir, step)
    form = form or ("peft" if run.lora else "merged")
    if form == "merged":
        return _write_model(run.model, out, dtype, _changes(run))
    if run.lora is None:
        raise UserError(f"--format {form}: {run_dir} trained the model itself, there is no adapter. Leave it out.")
    with _whole_directory(out, ADAPTER_CONFIG) as beside:
        read = partial(_read_factor, run.trained, run.lora)
        write_adapter(beside, _targets(run), run.lora, read, run.base, form, DTYPES.get(dtype, torch.float32))
        for file in beside.iterdir():
            _flush(file)
    return out


def merge_adapter(model: str, adapter: Path, out: Path, dtype: str = "auto", revision: str | None = None) -> Path:
    """Write a model with a PEFT adapter added to its weights, all else bit for bit; return `out`.

    Raises:
        UserError: an adapter of another model or kind, an `out` that holds something else, or a disk that refuses.
    """
    possible = possible_targets(_outline(model, revision))
    directory = local_directory(model, revision)
    if out.exists() and out.samefile(directory):
        raise UserError(f"--out {out} is the model itself. Choose another directory.")
    reader = AdapterReader(adapter, possible)
    return _write_model(directory, out, dtype, Merged(reader.targets, reader.read, scaling(reader.lora)).value)


def _open(run_dir: Path, step: int | None) -> Run:
    """Read what a run started from, and the state to export."""
    try:
        settings = yaml.safe_load((run_dir / "config.yaml").read_text())
    except OSError as error:
        raise UserError(f"--run {run_dir} is no run directory: it has no readable config.yaml.") from error
    checkpoints = run_dir / "checkpoints"
    checkpoint = newest(checkpoints)[0] if step is None else None
    if step is not None:
        if not step_directory(checkpoints, step).is_dir():
            there = ", ".join(sorted(path.name for path in checkpoints.glob("step-*"))) or "none"
            raise UserError(f"--step {step}: {run_dir} has no such checkpoint. It has: {there}.")
        checkpoint = open_checkpoint(step_directory(checkpoints, step))
    if checkpoint is None:
        raise UserError(f"--run {run_dir} has no checkpoint yet.")
    base, lora = settings["model"]["path"], settings.get("lora")
    model = local_directory(base, settings["model"].get("revision"))
    return Run(base, model, LoraSection.model_validate(lora) if lora else None, StateReader(checkpoint))


def _outline(model: str, revision: str | None = None):
    return build_stack(read_spec(model, revision), train_router=False, activation_checkpointing=False)


def _targets(run: Run) -> tuple[Target, ...]:
    """What the run adapted."""
    possible = possible_targets(_outline(str(run.model))).values()
    return tuple(target for target in possible if adapter_state_name(f"{target.name}.lora_A") in run.trained)


def _read_factor(trained: StateReader, lora: LoraSection, target: Target, factor: Factor) -> Tensor:
    return trained.read(adapter_state_name(f"{target.name}.{factor}"), "fp32").view(target.shape(factor, lora.r))


def _changes(run: Run) -> Change:
    """What the run made of the model's tensors."""
    if run.lora is None:
        return partial(_trained_tensor, run.trained)
    return Merged(_targets(run), partial(_read_factor, run.trained, run.lora), scaling(run.lora)).value


@contextmanager
def _whole_directory(out: Path, marker: str) -> Iterator[Path]:
    """Give a directory beside `out` to fill, which takes its place, or that of an older one with a `marker`."""
    if out.exists() and not (out.is_dir() and ((out / marker).is_file() or not any(out.iterdir()))):
        raise UserError(f"--out {out} exists and holds something else, no {marker}. Choose another.")
    beside = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        yield beside
        if out.exists():
            shutil.rmtree(out)
        beside.rename(out)
    except OSError as error:
        raise UserError(f"--out {out} could not be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_model(model: Path, out: Path, dtype: str, change: Change) -> Path:
    with _whole_directory(out, "config.json") as beside:
        _copy_companions(model, beside, dtype)
        _write_weights(WeightReader(model), change, beside, DTYPES.get(dtype))
    return out


def _copy_companions(model: Path, out: Path, dtype: str) -> None:
    """Config, generation config, tokenizer and chat template: everything but weights."""
    for file in sorted(model.iterdir()):
        if file.is_file() and file.suffix != ".safetensors" and file.name != INDEX:
            shutil.copyfile(file, out / file.name)
    if dtype in DTYPES:
        config = json.loads((out / "config.json").read_text())
        config["dtype"] = dtype
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_weights(reader: WeightReader, change: Change, out: Path, dtype: torch.dtype | None) -> None:
    """Write every file of the source again, its changed tensors replaced, in the source's layout."""
    files: dict[str, list[str]] = {}
    for tensor, file in reader.files.items():
        files.setdefault(file, []).append(tensor)
    weight_map, total = dict(reader.files), 0
    for number, (file, tensors) in enumerate(sorted(files.items())):
        content = {tensor: _export_tensor(tensor, reader, change, dtype) for tensor in tensors}
        if number == 0:
            content |= dict(_missing_encoder_scalars(reader))
            weight_map |= dict.fromkeys(content, file)
        total += sum(value.nbytes for value in content.values())
        save_file(content, out / file, metadata={"format": "pt"})
        _flush(out / file)
    if set(files) != {SINGLE}:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        _flush(out / INDEX)


def _export_tensor(tensor: str, reader: WeightReader, change: Change, dtype: torch.dtype | None) -> Tensor:
    """A tensor as it became, or as it was."""
    source = reader.read(tensor)
    changed = change(tensor, source)
    if changed is None:
        return source.to(dtype) if dtype and source.is_floating_point() else source
    return changed.to(dtype or source.dtype).contiguous()


def _trained_tensor(trained: StateReader, tensor: str, source: Tensor) -> Tensor | None:
    """A tensor put together from what was trained of it; None when nothing was."""
    names = sources_of(tensor)
    if names is None or names[0] not in trained:
        return None
    parts = [trained.read(name, "fp32") for name in names]
    if len(parts) == 2:  # gate and up, side by side in every expert
        experts, rows, *rest = source.shape
        return torch.cat([part.view(experts, rows // 2, *rest) for part in parts], dim=1)
    return parts[0].view(source.shape)


def _missing_encoder_scalars(reader: WeightReader) -> Iterator[tuple[str, Tensor]]:
    """The decoder's layer scalars for an encoder that has none: without them transformers leaves garbage."""
    for tensor in reader.files:
        if tensor.startswith("model.decoder.layers.") and tensor.endswith(".layer_scalar"):
            twin = ENCODER_LAYERS + tensor.removeprefix("model.decoder.layers.")
            if twin not in reader:
                yield twin, reader.read(tensor)


def _flush(file: Path) -> None:
    os.chmod(file, 0o644)  # safetensors writes for the owner alone
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
