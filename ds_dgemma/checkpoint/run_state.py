"""The training state on disk: whole or not at all, free of topology, no pickle.

`checkpoints/step-000100/` holds, per rank, safetensors files of flat fp32 shards (weights and Adam's moments), each
tagged with its interval in the logical tensor, and `state.json` (`manifest.py`): step, AdamW's step, size and checksum
of every file. Any number of ranks, any expert split and any ZeRO stage reads the intervals that overlap its own. Order
of data, noise and schedule need no more than the step.

What has another name than `step-NNNNNN` is debris of a writer (`save.py`).
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from ds_dgemma.checkpoint.manifest import check_content, check_sizes, read_state
from ds_dgemma.errors import UserError, first_line

_STEP = re.compile(r"step-(\d{6,})$")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    step: int
    state: dict[str, Any]


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step-{step:06d}"


def step_directories(root: Path) -> list[tuple[int, Path]]:
    """Every step's directory, whole or damaged, oldest first."""
    found = [(int(match[1]), path) for path in root.glob("step-*") if (match := _STEP.match(path.name))]
    return sorted(found)


def newest_until(checkpoints: Path, step: int) -> Path | None:
    """The newest checkpoint of a step or before, unopened; that of a skipped step has the weights it read."""
    return max((found for found in step_directories(checkpoints) if found[0] <= step), default=(0, None))[1]


def newest(root: Path) -> tuple["StateReader | None", list[str]]:
    """The newest checkpoint that is whole, and what is wrong with those that are newer; a collective as `open_state`.

    Raises:
        UserError: there are checkpoints, but none is whole: starting afresh would hide the loss.
    """
    problems: list[str] = []
    for _, path in reversed(step_directories(root)):
        try:
            return open_state(path), problems
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(
            "\n  ".join(["No complete checkpoint is left:", *problems, "Restore one, or choose a new run.dir."])
        )
    return None, problems


def open_checkpoint(path: Path) -> Checkpoint:
    """Check that a checkpoint is complete, by names and sizes, and read its state.json.

    Raises:
        UserError: missing, unreadable, or a file missing, superfluous, or of another size than was written.
    """
    state = read_state(path)
    if (named := _STEP.fullmatch(path.name)) and int(named[1]) != state["step"]:
        raise UserError(f"checkpoint {path} is of step {state['step']}. Give it its name back, or move it away.")
    check_sizes(path, state["files"])
    return Checkpoint(path, int(state["step"]), state)


def open_state(path: Path) -> "StateReader":
    """Open a checkpoint that is whole to its last bit. In a process group a collective, in which every rank looks at
    all sizes and headers and at the content of its share of the files, and all find the same.

    Raises:
        UserError: on every rank, when any found something missing or damaged.
    """
    grouped = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    reader, problem = None, None
    try:
        reader = StateReader(open_checkpoint(path))
        files = reader.checkpoint.state["files"]
        names = sorted(files)  # neighbours: on the same topology a rank reads what it wrote and will restore
        check_content(path, files, names[rank * len(names) // world : (rank + 1) * len(names) // world])
    except UserError as error:
        problem = str(error)
    problems: list[str | None] = [problem]
    if grouped:
        problems = [None] * world
        dist.all_gather_object(problems, problem)
    if found := next(filter(None, problems), None):
        raise UserError(found)
    assert reader is not None
    return reader


class StateReader:
    """Reads intervals of logical tensors from a checkpoint, whatever topology wrote it.

    Raises:
        UserError: a header that cannot be read, or that describes something else than flat fp32 shards.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.bytes_read = 0
        self._pieces: dict[str, list[tuple[int, int, safe_open]]] = {}
        for name in checkpoint.state["files"]:
            try:
                file = safe_open(checkpoint.path / name, "pt")
                intervals = json.loads(file.metadata()["intervals"])
                fault = next(_header_faults(file, intervals), None)
            except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"checkpoint {checkpoint.path} is damaged: {name}: {first_line(error)}.") from error
            if fault:
                raise UserError(f"checkpoint {checkpoint.path} is damaged: {name}: {fault}.")
            for tensor, (start, stop) in intervals.items():
                self._pieces.setdefault(tensor, []).append((start, stop, file))

    def __contains__(self, name: str) -> bool:
        return name in self._pieces

    def names(self) -> list[str]:
        """Every logical tensor."""
        return sorted(self._pieces)

    def numel(self, name: str) -> int:
        """Elements of a logical tensor."""
        return max(stop for _, stop, _ in self._pieces[name])

    def close(self) -> None:
        """Let go of the files: while they are open, a checkpoint that is removed gives no room back."""
        self._pieces.clear()

    def check_fits(self, sizes: dict[str, int]) -> None:
        """Refuse a state of other tensors than `sizes`, the elements of every logical tensor that is trained.

        Raises:
            UserError: the first tensor that differs; without a look at any content.
        """
        for name in sorted(sizes.keys() | self._pieces.keys()):
            found, wanted = self.numel(name) if name in self else 0, sizes.get(name, 0)
            if found != wanted:
                raise UserError(
                    f"checkpoint {self.checkpoint.path} does not fit this run: it has {found:,} elements of {name}, "
                    f"{wanted:,} are trained. It was written by another model or config: set run.resume and the config "
                    "to what belongs together."
                )

    def read(self, name: str, kind: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened logical tensor, fp32."""
        stop = self.numel(name) if stop is None else stop
        out, filled = torch.empty(stop - start), 0
        for first, last, file in self._pieces.get(name, []):
            a, b = max(first, start), min(last, stop)
            if a < b:
                out[a - start : b - start] = file.get_slice(f"{name}|{kind}")[a - first : b - first]
                self.bytes_read += 4 * (b - a)
                filled += b - a
        if filled != stop - start:
            raise UserError(
                f"checkpoint {self.checkpoint.path} does not fit this model: {name} has {filled} of the elements "
                f"{start}..{stop}. It was written by another model or config."
            )
        return out


def _header_faults(file: safe_open, intervals: dict[str, tuple[int, int]]) -> Iterator[str]:
    """What a header says that no writer of ours does."""
    lengths = {name: int(stop) - int(start) for name, (start, stop) in intervals.items()}
    there = set(file.keys())
    yield from (f"{name} is missing" for name in lengths if f"{name}|fp32" not in there)
    for key in sorted(there):
        stored = file.get_slice(key)
        shape, length = list(stored.get_shape()), lengths.get(key.rpartition("|")[0])
        if stored.get_dtype() != "F32" or length is None or shape != [length]:
            expected = "no interval names it" if length is None else f"F32 of shape [{length}] was expected"
            yield f"{key} is {stored.get_dtype()} of shape {shape}, {expected}"
