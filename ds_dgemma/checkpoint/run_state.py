"""The training state on disk: whole or not at all, free of topology, no pickle.

`checkpoints/step-000100/` holds, per rank, safetensors files of flat fp32 shards (weights and Adam's moments), each
tagged with its interval in the logical tensor, and `state.json`: step, AdamW's step, the size of every file. Any
number of ranks, any expert split and any ZeRO stage reads the intervals that overlap its own. Order of data, noise
and schedule need no more than the step.

A checkpoint is written into `step-000100.partial/`, flushed, and renamed last; what has another name than
`step-NNNNNN` is debris.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ds_dgemma.checkpoint.whole_directory import flush, sync_directory
from ds_dgemma.errors import UserError, first_line

STATE = "state.json"
FILE_BYTES = 2 * 2**30  # of host memory for copies while writing
_STEP = re.compile(r"step-(\d{6,})$")


class Shard(Protocol):
    """An interval of a logical tensor; `engine/optimizer_state.py` makes them."""

    @property
    def name(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def get(self) -> Any: ...


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    step: int
    state: dict[str, Any]


def check_same_model(path: str, digest: str, checkpoint: Checkpoint) -> None:
    """Refuse to go on from, or to export into, other weights: what was not trained is read from them.

    Raises:
        UserError: the model at `path`, of which `digest` is, changed since the checkpoint.
    """
    if checkpoint.state.get("model_digest", digest) != digest:
        raise UserError(
            f"model.path: {path} has changed since {checkpoint.path} was written: other tensors or other values. "
            "Restore the model that the run started from, or choose a new run.dir."
        )


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step-{step:06d}"


def save(
    root: Path, step: int, shards: Iterable[Shard], kinds: tuple[str, ...], rank: int, facts: dict[str, Any]
) -> None:
    """Write this rank's shards; a collective. `facts` (JSON) come back in `Checkpoint.state`.

    Raises:
        UserError: on every rank, when any could not write; older checkpoints are untouched.
    """
    final = step_directory(root, step)
    partial = final.with_suffix(".partial")
    _together("make room for", final, lambda: _fresh(partial) if rank == 0 else None)
    sizes = _together("write", final, lambda: _write_shards(partial, shards, kinds, rank))
    files = {name: size for part in sizes for name, size in part.items()}

    def publish() -> None:
        if rank != 0:
            return
        _write_durably(partial / STATE, json.dumps({"step": step, **facts, "files": files}, indent=1))
        if final.exists():  # the same step, written again after a resume
            shutil.rmtree(final)
        partial.rename(final)
        sync_directory(root)

    _together("publish", final, publish)


def prune(root: Path, keep_last: int) -> None:
    """Remove all but the newest complete checkpoints, and the debris of unfinished ones."""
    steps = sorted(path for path in root.glob("step-*") if _STEP.match(path.name))
    for path in [*steps[:-keep_last], *root.glob("step-*.partial")]:
        shutil.rmtree(path, ignore_errors=True)


def newest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint, and what is wrong with those that are newer.

    Raises:
        UserError: there are checkpoints, but none is complete: starting afresh would hide the loss.
    """
    problems: list[str] = []
    for path in sorted((p for p in root.glob("step-*") if _STEP.match(p.name)), reverse=True):
        try:
            checkpoint = open_checkpoint(path)
            StateReader(checkpoint)  # its headers can be read
            return checkpoint, problems
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(
            "\n  ".join(["No complete checkpoint is left:", *problems, "Restore one, or choose a new run.dir."])
        )
    return None, problems


def open_checkpoint(path: Path) -> Checkpoint:
    """Check that a checkpoint is complete and read its state.json.

    Raises:
        UserError: missing, unreadable, or a file missing or of another size than was written.
    """
    if not path.is_dir():
        raise UserError(f"checkpoint {path} does not exist.")
    try:
        state = json.loads((path / STATE).read_text())
        files, step = dict(state["files"]), int(state["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {path}: {STATE} is missing or broken: {first_line(error)}.") from error
    for name, size in files.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise UserError(f"checkpoint {path} is not complete: {name} is missing.")
        if file.stat().st_size != size:
            raise UserError(
                f"checkpoint {path} is damaged: {name} has {file.stat().st_size} bytes, {size} were written."
            )
    return Checkpoint(path, step, state)


class StateReader:
    """Reads intervals of logical tensors from a checkpoint, whatever topology wrote it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.bytes_read = 0
        self._pieces: dict[str, list[tuple[int, int, safe_open]]] = {}
        for name in checkpoint.state["files"]:
            try:
                file = safe_open(checkpoint.path / name, "pt")
                intervals = json.loads(file.metadata()["intervals"])
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"checkpoint {checkpoint.path} is damaged: {name}: {first_line(error)}.") from error
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


def _write_shards(partial: Path, shards: Iterable[Shard], kinds: tuple[str, ...], rank: int) -> dict[str, int]:
    """Write this rank's files; return their sizes."""
    sizes = {}
    for number, group in enumerate(_groups(shards, len(kinds))):
        file = partial / f"rank-{rank:05d}-{number:03d}.safetensors"
        tensors = {
            f"{shard.name}|{kind}": shard.get(kind).detach().to("cpu", torch.float32, copy=True).contiguous()
            for shard in group
            for kind in kinds
        }
        intervals = {shard.name: (shard.start, shard.stop) for shard in group}
        save_file(tensors, file, metadata={"intervals": json.dumps(intervals)})
        flush(file)
        sizes[file.name] = file.stat().st_size
    return sizes


def _groups(shards: Iterable[Shard], kinds: int) -> Iterator[list[Shard]]:
    """Cut the shards into files of about FILE_BYTES."""
    group: list[Shard] = []
    held = 0
    for shard in shards:
        size = 4 * kinds * (shard.stop - shard.start)
        if group and held + size > FILE_BYTES:
            yield group
            group, held = [], 0
        group.append(shard)
        held += size
    if group:
        yield group


def _together(verb: str, path: Path, work: Any) -> list[Any]:
    """Do `work` on every rank and return every rank's result, or raise on all when it failed on any."""
    result, problem = None, None
    try:
        result = work()
    except (OSError, SafetensorError) as error:
        problem = first_line(error)
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, problem))
    problems = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(outcomes) if text]
    if problems:
        raise UserError(
            f"could not {verb} the checkpoint {path} ({'; '.join(problems)}). Older checkpoints are untouched."
        )
    return [value for value, _ in outcomes]


def _fresh(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _write_durably(file: Path, text: str) -> None:
    with file.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
