"""Write the training state: beside its place, flushed, read back, and renamed last. All ranks agree at every stage.

The next step changes the state in place, so writing in the background would need a second copy of it, 12 bytes a
parameter. What is done behind: a file is flushed and read back while the next one is copied and written. Reading back
may be served from the kernel's cache; what a disk forgets later is found when a run starts (`run_state.open_state`).
"""

import errno
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from xxhash import xxh3_128

from ds_dgemma.checkpoint.manifest import CHECKSUM, Entry, describe, write_state
from ds_dgemma.checkpoint.run_state import open_checkpoint, step_directory
from ds_dgemma.errors import UserError, first_line
from ds_dgemma.files import flush, sync_directory

FILE_BYTES = 2 * 2**30  # of host memory for copies while writing
PARTIAL = ".partial"  # being written
OLD = ".old"  # the same step's older one, while a new one takes its place


class Shard(Protocol):
    """An interval of a logical tensor; `engine/optimizer_state.py` makes them."""

    @property
    def name(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def kinds(self) -> tuple[str, ...]: ...
    @property
    def get(self) -> Any: ...


class NotWritten(UserError):
    """A checkpoint could not be written, on all ranks alike; what was there before is untouched."""


def save(root: Path, step: int, shards: Iterable[Shard], rank: int, facts: dict[str, Any]) -> None:
    """Write this rank's shards; a collective. `facts` (JSON) come back in `Checkpoint.state`.

    Raises:
        NotWritten: on every rank, when any could not write: a full disk, a quota, a right that is missing. Nothing of
        the attempt stays on the disk.
    """
    final = step_directory(root, step)
    partial = final.with_name(final.name + PARTIAL)
    try:
        _together("make room for", final, lambda: _fresh(partial) if rank == 0 else None)
        entries = _together("write", final, lambda: _write_shards(partial, shards, rank))
        files = {name: entry for part in entries for name, entry in part.items()}
        _together("publish", final, lambda: _publish(partial, final, step, facts, files) if rank == 0 else None)
    except NotWritten:
        if rank == 0:  # no rank writes into it any more
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier()  # a rank that ended now would have the launcher end this one
        raise


def settle(root: Path) -> None:
    """Give a step back its older checkpoint, where a writer was killed before the new one took its place; the run's
    only writer may call it.
    """
    for old in root.glob(f"step-*{OLD}"):
        final = old.with_name(old.name.removesuffix(OLD))
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(final)


def _write_shards(partial: Path, shards: Iterable[Shard], rank: int) -> dict[str, Entry]:
    """Write this rank's files; return their entries in the manifest."""
    entries: dict[str, Entry] = {}
    before: tuple[str, Future[Entry]] | None = None
    with ThreadPoolExecutor(1) as behind:
        for number, group in enumerate(_groups(shards)):
            file = partial / f"rank-{rank:05d}-{number:03d}.safetensors"
            expected = _write(file, group)
            if before:
                entries[before[0]] = before[1].result()
            before = file.name, behind.submit(_flushed, file, expected)
        if before:
            entries[before[0]] = before[1].result()
    return entries


def _write(file: Path, group: list[Shard]) -> str:
    """Write one file; return the checksum that it must have: its header's and that of the numbers in memory."""
    tensors = {
        f"{shard.name}|{kind}": shard.get(kind).detach().to("cpu", torch.float32, copy=True).contiguous()
        for shard in group
        for kind in shard.kinds
    }
    intervals = {shard.name: (shard.start, shard.stop) for shard in group}
    save_file(tensors, file, metadata={"intervals": json.dumps(intervals)})
    digest = xxh3_128()
    with file.open("rb") as stream:
        length = stream.read(8)
        digest.update(length + stream.read(int.from_bytes(length, "little")))
    with safe_open(file, "pt") as written:
        for key in written.offset_keys():
            digest.update(tensors[key].numpy())
    return digest.hexdigest()


def _flushed(file: Path, expected: str) -> Entry:
    """Bring a file to the disk and read it back."""
    flush(file)
    entry = describe(file)
    if entry[CHECKSUM] != expected:
        raise OSError(errno.EIO, "reads back other than it was written", str(file))
    return entry


def _groups(shards: Iterable[Shard]) -> Iterator[list[Shard]]:
    """Cut the shards into files of about FILE_BYTES."""
    group: list[Shard] = []
    held = 0
    for shard in shards:
        size = 4 * len(shard.kinds) * (shard.stop - shard.start)
        if group and held + size > FILE_BYTES:
            yield group
            group, held = [], 0
        group.append(shard)
        held += size
    if group:
        yield group


def _publish(partial: Path, final: Path, step: int, facts: dict[str, Any], files: dict[str, Entry]) -> None:
    """Write the manifest, see that every rank's files are here, and put the checkpoint in its place."""
    write_state(partial, {"step": step, **facts}, files)
    sync_directory(partial)
    open_checkpoint(partial)
    old = final.with_name(final.name + OLD)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():  # the same step, written again after a resume
        final.rename(old)
    try:
        partial.rename(final)
    except OSError:
        if old.exists():
            old.rename(final)
        raise
    sync_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _together(verb: str, path: Path, work: Callable[[], Any]) -> list[Any]:
    """Do `work` on every rank and return every rank's result, or raise on all when it failed on any."""
    result, problem = None, None
    try:
        result = work()
    except (OSError, SafetensorError, UserError) as error:
        problem = first_line(error)
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, problem))
    problems = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(outcomes) if text]
    if problems:
        raise NotWritten(
            f"could not {verb} the checkpoint {path} ({'; '.join(problems)}). Older checkpoints are untouched."
        )
    return [value for value, _ in outcomes]


def _fresh(directory: Path) -> None:
    """Make an empty directory, in the room that killed writers took."""
    for debris in directory.parent.glob(f"step-*{PARTIAL}"):
        shutil.rmtree(debris, ignore_errors=True)
    directory.mkdir()  # not its parents: a run directory that was moved or unmounted is not made again elsewhere
