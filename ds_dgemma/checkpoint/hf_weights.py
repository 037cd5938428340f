"""Write a model's weights as transformers does: shards of bounded size under a common index, several at once.

What is in memory is the shards that are being written, one a worker. Workers are threads: reading, converting and
writing all leave the interpreter free.
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor

from ds_dgemma.checkpoint.weights import INDEX, WeightReader
from ds_dgemma.checkpoint.whole_directory import flush
from ds_dgemma.errors import UserError
from ds_dgemma.model.names import DECODER_LAYERS, ENCODER_LAYERS, tied_to

# (name, the model that was started from, type to return) -> what the tensor became; None: it stayed
Change = Callable[[str, WeightReader, torch.dtype], Tensor | None]


@dataclass(frozen=True)
class Layout:
    """How weights are written."""

    dtype: torch.dtype | None = None  # of every tensor; None: of changed ones `changed_dtype`, the others as they were
    changed_dtype: torch.dtype | None = None  # None: as it was
    shard_bytes: int = 5 * 10**9  # a larger tensor has a shard of its own
    workers: int = 1


def write_weights(model: Path, change: Change, out: Path, layout: Layout) -> None:
    """Write the weights of the directory `model`, with their changes, into the directory `out`, flushed.

    Copies of tied weights are left out: beside what the original became they would be stale, and transformers does not
    tie two weights that differ.

    Raises:
        UserError: a tensor that changed would hold NaN or infinity.
    """
    reader = WeightReader(model)
    kept = {name: name for name in reader.files if tied_to(name) not in reader.files}
    stored = {**kept, **_missing_encoder_scalars(reader)}
    sizes = {name: reader.nbytes(source, layout.dtype) for name, source in stored.items()}
    plan = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=layout.shard_bytes,
    )
    reader.close()

    def write(file: str) -> int:
        reader = WeightReader(model)  # one a thread: it keeps a file open
        content = {}
        for name in plan.filename_to_tensors[file]:
            value = _value(stored[name], reader, change, layout)
            content[name] = value if name in kept else value.clone()  # safetensors shares no memory
        save_file(content, out / file, metadata={"format": "pt"})
        flush(out / file)
        return sum(tensor.nbytes for tensor in content.values())

    with ThreadPoolExecutor(layout.workers) as pool:
        total = sum(pool.map(write, plan.filename_to_tensors))
    if plan.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(plan.tensor_to_filename.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        flush(out / INDEX)


def _value(name: str, reader: WeightReader, change: Change, layout: Layout) -> Tensor:
    """A tensor as it became, or as it was."""
    changed = change(name, reader, layout.dtype or layout.changed_dtype or reader.torch_dtype(name))
    if changed is None:
        source = reader.read(name)
        return source.to(layout.dtype) if layout.dtype and source.is_floating_point() else source
    if not _is_finite(changed):
        cause = (
            "what was trained does not fit into it, or has diverged. Give --dtype float32, or take an earlier one"
            if _is_finite(reader.read(name))
            else f"that of {reader.directory} does already. Copy or download it again"
        )
        raise UserError(f"{name} would hold NaN or infinity as {str(changed.dtype).removeprefix('torch.')}: {cause}.")
    return changed


def _is_finite(tensor: Tensor) -> bool:
    return all(bound.isfinite() for bound in torch.aminmax(tensor))  # NaN is both; takes no memory


def _missing_encoder_scalars(reader: WeightReader) -> dict[str, str]:
    """The encoder's layer scalars where there are none, and the decoder's in their place: without them transformers
    leaves garbage.
    """
    twins = {
        ENCODER_LAYERS + name.removeprefix(DECODER_LAYERS): name
        for name in reader.files
        if name.startswith(DECODER_LAYERS) and name.endswith(".layer_scalar")
    }
    return {twin: name for twin, name in twins.items() if twin not in reader}
