"""Read a transformers checkpoint by slice: a rank touches only the bytes that it keeps.

A checkpoint is a directory, or a hub id that huggingface_hub resolves to one (its cache respected), with
`model.safetensors` or shards under an index. Nothing is unpickled.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from ds_dgemma.errors import UserError, first_line
from ds_dgemma.model.names import Place
from ds_dgemma.model.spec import check_path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FILES = ["*.safetensors", "*.json", "*.jinja", "*.model"]  # of a hub id: never what has to be unpickled
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PIECE = 2**24  # elements
SAMPLE = 4096  # elements at the start, in the middle and at the end of a tensor that stand for all of it
# Quantized weights would need their scales.
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def local_directory(path: str, revision: str | None = None, *, download: bool = True) -> Path:
    """The directory of a local checkpoint, or of a hub id: after its download, or as huggingface_hub's cache has it.

    Raises:
        UserError: no such directory, or one with a revision, or the hub or the cache does not have all of it.
    """
    if check_path(path, revision):
        return Path(path)
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=FILES, local_files_only=not download))
    except Exception as error:  # huggingface_hub raises many kinds; each means that the checkpoint is not to be had
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"model.path: {path}{at} is no directory and could not be fetched: {first_line(error)}"
        ) from error


class WeightReader:
    """Reads ranges of a checkpoint's tensors; `bytes_read` counts what was asked of the files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = _tensor_files(directory)
        self.bytes_read = 0
        self._open: tuple[str, safe_open] | None = None

    def __contains__(self, tensor: str) -> bool:
        return tensor in self.files

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The stored shape of a tensor; reads a header only."""
        return tuple(self._slice(tensor).get_shape())

    def dtype(self, tensor: str) -> str:
        """The stored type of a tensor in safetensors' spelling, `BF16`; reads a header only."""
        return self._slice(tensor).get_dtype()

    def torch_dtype(self, tensor: str) -> torch.dtype:
        """The stored type of a tensor of numbers with a fraction."""
        return FLOATS[self.dtype(tensor)]

    def nbytes(self, tensor: str, dtype: torch.dtype | None = None) -> int:
        """Bytes of a tensor, as it is stored or in another type; reads a header only."""
        bits = re.search(r"\d+", self.dtype(tensor))
        size = dtype.itemsize if dtype else int(bits[0]) // 8 if bits else 1
        return prod(self.shape(tensor)) * size

    def read(self, tensor: str) -> torch.Tensor:
        """Read a whole tensor."""
        value = self._slice(tensor)[...]
        self.bytes_read += value.nbytes
        return value

    def read_into(self, flat: torch.Tensor, place: Place, start: int, stop: int) -> None:
        """Copy elements [start, stop) of the flattened part `place` into `flat` (same count, any dtype and device)."""
        if stop <= start:
            return
        stored = self._slice(place.tensor)
        shape = place.view_shape(tuple(stored.get_shape()))
        origin = [bounds[0] for bounds in (place.experts, place.rows) if bounds]
        origin += [0] * (len(shape) - len(origin))
        filled = 0
        for first, last in pieces(start, stop):
            for index in _boxes(shape, first, last):
                shifted = tuple(slice(s.start + o, s.stop + o) for s, o in zip(index, origin, strict=True))
                piece = stored[shifted] if shifted else stored[...]
                self.bytes_read += piece.nbytes
                flat[filled : filled + piece.numel()].copy_(piece.reshape(-1))
                filled += piece.numel()

    def sample(self, tensor: str) -> torch.Tensor:
        """The start, the middle and the end of a tensor in fp32, as int32 bits: equal NaN are equal."""
        size = prod(self.shape(tensor))
        starts = [0, max(size // 2 - SAMPLE // 2, 0), max(size - SAMPLE, 0)]
        samples = torch.empty(len(starts), min(size, SAMPLE))
        for sample, start in zip(samples, starts, strict=True):
            self.read_into(sample, Place(tensor), start, start + len(sample))
        return samples.view(torch.int32)

    def close(self) -> None:
        """Unmap the file that is open."""
        self._open = None

    def _slice(self, tensor: str):
        file = self.files[tensor]
        if self._open is None or self._open[0] != file:
            self._open = None  # one file mapped at a time: its pages count as ours while it is
            try:
                self._open = (file, safe_open(self.directory / file, "pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{self.directory / file} cannot be read: {first_line(error)}. Copy or download it again."
                ) from error
        try:
            return self._open[1].get_slice(tensor)
        except SafetensorError as error:
            raise UserError(f"{self.directory / file} lacks {tensor}, which the index places there.") from error


def model_digest(directory: Path) -> str:
    """A digest of every tensor's name, type, shape and sampled values, however they lie in files."""
    reader, digests = WeightReader(directory), {}
    for tensor in sorted(reader.files, key=reader.files.__getitem__):  # a file is opened once
        header = f"{tensor} {reader.dtype(tensor)} {reader.shape(tensor)}".encode()
        digests[tensor] = hashlib.sha256(header + reader.sample(tensor).numpy().tobytes()).digest()
    return hashlib.sha256(b"".join(digests[tensor] for tensor in sorted(digests))).hexdigest()


def pieces(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut a flat range into what is copied at once: a copy beside the tensor that it fills stays small."""
    for first in range(start, stop, PIECE):
        yield first, min(first + PIECE, stop)


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> list[tuple[slice, ...]]:
    """Cover the flat range [start, stop) of a row-major array with boxes: partial first row, whole rows, partial
    last row.
    """
    if not shape:
        return [()]
    row = prod(shape[1:])
    first, last = start // row, stop // row
    inner = lambda index, a, b: [(slice(index, index + 1), *box) for box in _boxes(shape[1:], a, b)]  # noqa: E731
    if first == last:
        return inner(first, start - first * row, stop - first * row)
    boxes = inner(first, start - first * row, row) if start % row else []
    whole = first + 1 if start % row else first
    if whole < last:
        boxes.append((slice(whole, last), *(slice(0, size) for size in shape[1:])))
    return boxes + (inner(last, 0, stop - last * row) if stop % row else [])


def _pickled_hint(directory: Path) -> str:
    """What to do with weights that could run code when they are loaded."""
    pickled = sorted(file.name for file in directory.iterdir() if file.suffix in PICKLED)
    if not pickled:
        return ""
    return (
        f" {pickled[0]} is pickled, which can run code when it is read: refused. If you trust it, let transformers "
        "write it anew: DiffusionGemmaForBlockDiffusion.from_pretrained(DIR).save_pretrained(OUT)."
    )


def _tensor_files(directory: Path) -> dict[str, str]:
    """Tensor name -> file name, with every named file present and inside the directory.

    The single file goes before an index that is there too: so transformers reads the directory
    (`modeling_utils._get_resolved_checkpoint_files`).
    """
    if (directory / SINGLE).is_file():
        try:
            with safe_open(directory / SINGLE, "pt") as file:
                files = dict.fromkeys(file.keys(), SINGLE)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{directory / SINGLE} cannot be read: {first_line(error)}. Copy or download it again."
            ) from error
    elif (directory / INDEX).is_file():
        try:
            weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise TypeError("weight_map does not give every tensor a file name")
            files: dict[str, str] = weight_map
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{directory / INDEX} is broken: {first_line(error)}. Download it again.") from error
    else:
        raise UserError(f"{directory} holds no weights: neither {SINGLE} nor {INDEX}.{_pickled_hint(directory)}")
    for name in sorted(set(files.values())):
        if Path(name).name != name:
            raise UserError(f"{directory / INDEX} names {name!r}, which is not a plain file name. Refused.")
        if not (directory / name).is_file():
            raise UserError(f"{directory} lacks the shard {name} that its index names. Copy or download it again.")
    return files
