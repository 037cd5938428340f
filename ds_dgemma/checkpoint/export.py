"""From a run directory to files that others load: no launcher, no GPU, never the whole model in memory.

A trained model becomes a checkpoint for transformers; a LoRA run an adapter for PEFT, or, merged, a checkpoint
too. The training state is in logical tensors, so a single process can put transformers' tensors together whatever
topology trained them. What was not trained (vision tower, layer scalars, frozen parts) is copied bit for bit from the
model that the run started from. A directory appears whole or not at all.
"""

import json
import re
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ds_dgemma.checkpoint.adapter import CONFIG as ADAPTER_CONFIG
from ds_dgemma.checkpoint.adapter import AdapterReader
from ds_dgemma.checkpoint.adapter_export import write_adapter
from ds_dgemma.checkpoint.hf_weights import Change, Layout, write_weights
from ds_dgemma.checkpoint.load import check_places
from ds_dgemma.checkpoint.merge import Merged
from ds_dgemma.checkpoint.run_state import StateReader
from ds_dgemma.checkpoint.trained_run import Run, open_run
from ds_dgemma.checkpoint.weights import PICKLED, WeightReader, local_directory, pieces
from ds_dgemma.checkpoint.whole_directory import whole_directory
from ds_dgemma.config.run import LoraSection
from ds_dgemma.errors import UserError
from ds_dgemma.model.build import build_stack
from ds_dgemma.model.lora import Factor, Target, possible_targets, scaling
from ds_dgemma.model.names import adapter_state_name, places_of, sources_of
from ds_dgemma.model.spec import read_spec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What weights lie in, a model's other copies too; the last ones are of GGML, Keras, Flax, ONNX and Rust.
WEIGHTS = (".safetensors", *PICKLED, ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot")
Format = Literal["peft", "merged"]


def export_run(
    run_dir: Path,
    out: Path,
    step: int | Literal["best"] | None = None,
    dtype: str = "auto",
    form: Format | None = None,
    layout: Layout | None = None,
) -> Path:
    """Write a run's checkpoint (the newest, of `step`, or the best) as `form` says; return `out`.

    `form` None is an adapter for PEFT after a LoRA run, else, as always with merged, a transformers directory. `dtype`
    auto writes what a bf16 run trained in bf16 and keeps every other tensor's type in the model that the run started
    from; an adapter's are the fp32 that was trained.

    Raises:
        UserError: no such run or checkpoint, a model that has changed since, no adapter to write, an `out` that holds
        something else, or a disk that refuses.
    """
    run = open_run(run_dir, step)
    form = form or ("peft" if run.lora else "merged")
    if form == "merged":
        changed_dtype = torch.bfloat16 if run.bf16 and run.lora is None else None
        layout = replace(layout or Layout(), dtype=DTYPES.get(dtype), changed_dtype=changed_dtype)
        return _write_model(run.model, out, changes_of(run), layout)
    if run.lora is None:
        raise UserError(f"--format {form}: {run_dir} trained the model itself, there is no adapter. Leave it out.")
    with whole_directory(out, ADAPTER_CONFIG, set()) as beside:
        read = partial(_read_factor, run.trained, run.lora)
        stored = DTYPES.get(dtype, torch.float32)
        write_adapter(beside, _targets(run), run.lora, read, run.base, run.revision, stored)
    return out


def adapter_change(reader: AdapterReader) -> Change:
    """What an adapter makes of a model's tensors."""
    return Merged(reader.targets, reader.read, scaling(reader.lora)).change


def merge_adapter(
    model: str,
    adapter: Path,
    out: Path,
    dtype: str = "auto",
    revision: str | None = None,
    layout: Layout | None = None,
) -> Path:
    """Write a model with a PEFT adapter added to its weights, all else bit for bit; return `out`.

    Raises:
        UserError: a checkpoint that is not whole, an adapter of another model or kind, an `out` that holds something
        else, or a disk that refuses.
    """
    directory = local_directory(model, revision)
    stack = _outline(directory)
    possible = possible_targets(stack)
    check_places(stack, places_of(stack), WeightReader(directory), copy_decoder_scalars=True)
    reader = AdapterReader(adapter, possible)
    if warning := reader.base_warning(model):
        print(warning, file=sys.stderr)
    return _write_model(directory, out, adapter_change(reader), replace(layout or Layout(), dtype=DTYPES.get(dtype)))


def _outline(directory: Path):
    return build_stack(read_spec(str(directory)))


def _targets(run: Run) -> tuple[Target, ...]:
    """What the run adapted."""
    possible = possible_targets(_outline(run.model)).values()
    return tuple(target for target in possible if adapter_state_name(f"{target.name}.lora_A") in run.trained)


def _read_factor(trained: StateReader, lora: LoraSection, target: Target, factor: Factor) -> Tensor:
    return trained.read(adapter_state_name(f"{target.name}.{factor}"), "fp32").view(target.shape(factor, lora.r))


def changes_of(run: Run) -> Change:
    """What the run made of the model's tensors."""
    if run.lora is None:
        return partial(_trained_tensor, run.trained)
    return Merged(_targets(run), partial(_read_factor, run.trained, run.lora), scaling(run.lora)).change


def _write_model(model: Path, out: Path, change: Change, layout: Layout) -> Path:
    if out.resolve().is_relative_to(model.resolve()):
        raise UserError(f"--out {out} is the model itself, or in its directory, {model}. Choose another.")
    with whole_directory(out, "config.json", {file.name for file in model.iterdir()}) as beside:
        _copy_companions(model, beside, layout.dtype or layout.changed_dtype)
        write_weights(model, change, beside, layout)
    return out


def _copy_companions(model: Path, out: Path, dtype: torch.dtype | None) -> None:
    """Config, generation config, tokenizer and chat template: everything but weights, which are the old ones."""
    for file in sorted(model.iterdir()):
        if file.is_file() and file.suffix not in WEIGHTS and not re.search(r"\.index(\.\w+)?\.json$", file.name):
            shutil.copyfile(file, out / file.name)
    config = json.loads((out / "config.json").read_text())
    if dtype and config.get("dtype") != (name := str(dtype).removeprefix("torch.")):
        (out / "config.json").write_text(json.dumps({**config, "dtype": name}, indent=2) + "\n")


def _trained_tensor(trained: StateReader, tensor: str, reader: WeightReader, dtype: torch.dtype) -> Tensor | None:
    """A tensor put together from what was trained of it; None when nothing was."""
    names = sources_of(tensor)
    if names is None or names[0] not in trained:
        return None
    whole = torch.empty(reader.shape(tensor), dtype=dtype)
    if len(names) == 1:
        flat = whole.view(-1)
        for first, last in pieces(0, len(flat)):
            flat[first:last] = trained.read(names[0], "fp32", first, last)
        return whole
    parts = whole.view(len(whole), len(names), -1)  # gate and up, side by side in every expert
    for number, name in enumerate(names):
        size = parts.shape[-1]
        for expert in range(len(whole)):
            parts[expert, number] = trained.read(name, "fp32", expert * size, (expert + 1) * size)
    return whole
