"""From a run directory to a checkpoint that unmodified transformers loads: no launcher, no GPU, one file in memory
at a time.

The training state is in logical tensors, so a single process can put transformers' tensors together whatever
topology trained them. What was not trained (vision tower, layer scalars, frozen parts) is copied bit for bit from
the model that the run started from.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from ds_dgemma.checkpoint.names import ENCODER_LAYERS, sources_of
from ds_dgemma.checkpoint.run_state import StateReader, newest, open_checkpoint, step_directory
from ds_dgemma.checkpoint.weights import INDEX, SINGLE, WeightReader, local_directory
from ds_dgemma.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export_run(run_dir: Path, out: Path, step: int | None = None, dtype: str = "auto") -> Path:
    """Write the weights of a run's checkpoint (the newest, or of `step`) as a transformers directory; return it.

    `dtype` auto keeps every tensor's type in the model that the run started from. The directory appears whole or
    not at all.

    Raises:
        UserError: no such run or checkpoint, an `out` that holds something else, or a disk that refuses.
    """
    model, trained = _open(run_dir, step)
    if out.exists() and not (out.is_dir() and ((out / "config.json").is_file() or not any(out.iterdir()))):
        raise UserError(f"--out {out} exists and is no checkpoint directory. Choose another.")
    beside = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        _copy_companions(model, beside, dtype)
        _write_weights(WeightReader(model), trained, beside, DTYPES.get(dtype))
        if out.exists():
            shutil.rmtree(out)
        beside.rename(out)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(f"--out {out} could not be written: {error.strerror or error}.") from error
    return out


def _open(run_dir: Path, step: int | None) -> tuple[Path, StateReader]:
    """The model directory that a run started from, and the state to export."""
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
    model = local_directory(settings["model"]["path"], settings["model"].get("revision"))
    return model, StateReader(checkpoint)


def _copy_companions(model: Path, out: Path, dtype: str) -> None:
    """Config, generation config, tokenizer and chat template: everything but weights."""
    for file in sorted(model.iterdir()):
        if file.is_file() and file.suffix != ".safetensors" and file.name != INDEX:
            shutil.copyfile(file, out / file.name)
    if dtype in DTYPES:
        config = json.loads((out / "config.json").read_text())
        config["dtype"] = dtype
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_weights(reader: WeightReader, trained: StateReader, out: Path, dtype: torch.dtype | None) -> None:
    """Write every file of the source again, its trained tensors replaced, in the source's layout."""
    files: dict[str, list[str]] = {}
    for tensor, file in reader.files.items():
        files.setdefault(file, []).append(tensor)
    weight_map, total = dict(reader.files), 0
    for number, (file, tensors) in enumerate(sorted(files.items())):
        content = {tensor: _export_tensor(tensor, reader, trained, dtype) for tensor in tensors}
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


def _export_tensor(tensor: str, reader: WeightReader, trained: StateReader, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor as trained, or as it was where it was not trained."""
    source = reader.read(tensor)
    names = sources_of(tensor)
    if names is None or names[0] not in trained:
        return source.to(dtype) if dtype and source.is_floating_point() else source
    parts = [trained.read(name, "fp32") for name in names]
    if len(parts) == 2:  # gate and up, side by side in every expert
        experts, rows, *rest = source.shape
        value = torch.cat([part.view(experts, rows // 2, *rest) for part in parts], dim=1)
    else:
        value = parts[0].view(source.shape)
    return value.to(dtype or source.dtype).contiguous()


def _missing_encoder_scalars(reader: WeightReader) -> Iterator[tuple[str, torch.Tensor]]:
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
