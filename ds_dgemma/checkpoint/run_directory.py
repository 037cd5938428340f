"""The run directory: it belongs to one config (`config/recorded.py`) and to one running job, and says where the run
stands.

config.yaml     resolved settings      deepspeed.json  what DeepSpeed was told
metrics.jsonl   one object a step      checkpoints/    step-NNNNNN/
replay/         step-NNNNNN.json, what a skipped step computed on
run.lock        held by rank 0 while the run is alive; says which process of which host that is, or was
complete.json   {"step": N}: the last step is done and all is written; with "early_stopping_patience" where that ended
                it. An exit code alone proves nothing: DeepSpeed's launcher exits with 0 when it is killed
"""

import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ds_dgemma.checkpoint.run_state import StateReader, newest, open_state, step_directories, step_directory
from ds_dgemma.checkpoint.save import settle
from ds_dgemma.config.recorded import CHECKPOINTS, COMPLETE, CONFIG, METRICS, resolved_yaml
from ds_dgemma.config.run import RunConfig
from ds_dgemma.errors import UserError, told
from ds_dgemma.files import atomic_file, lock, sync_directory
from ds_dgemma.ranks.layout import RankLayout, gather

DEEPSPEED = "deepspeed.json"
LOCK = "run.lock"
LOCK_SECONDS = 20  # the ranks of a launcher that was killed need a moment to notice


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    resumed: StateReader | None  # None: with the model
    warnings: Sequence[str] = ()

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.resumed.checkpoint.step if self.resumed else 0


def contents(directory: Path) -> list[str]:
    """What a rank sees of a run's state."""
    steps = [path.name for _, path in step_directories(directory / CHECKPOINTS)]
    return [owner(directory), *steps, *(name for name in (CONFIG, METRICS) if (directory / name).is_file())]


def check_shared(directory: Path, ranks: RankLayout) -> None:
    """Raise `UserError`, on every rank, unless all see the same `contents`; a collective."""
    here = contents(directory)
    seen = gather(here, ranks)
    for rank, names in enumerate(seen):
        if names != seen[0]:
            differ = min((set(names) ^ set(seen[0])) - {""})
            raise UserError(
                f"run.dir: {directory} is not the same directory for all ranks: only one of rank 0 and rank {rank} "
                f"sees {differ}. Put it on a disk that they share."
            )


def find_start(config: RunConfig) -> Start:
    """Which checkpoint to continue from, whole to its last bit; changes nothing. In a process group a collective.

    Call it when the directory is claimed, or what another job still writes would be missed; when it is known to be
    this run's (`check_belongs`); and when all ranks are known to see the same (`check_shared`), for they look at one
    checkpoint after another together.

    Raises:
        UserError: the directory holds nothing to continue from that is whole.
    """
    own = config.run.dir / CHECKPOINTS
    latest = Start(*newest(own))
    if config.run.resume in ("auto", "never"):
        return latest
    return _named_start(Path(config.run.resume), own, latest, config.train.max_steps)


def _named_start(path: Path, own: Path, latest: Start, max_steps: int) -> Start:
    """Start from a checkpoint that `run.resume` names; of another run it is only where this one began."""
    ours = path.resolve().parent == own.resolve()
    if latest.resumed and not ours:
        return latest
    named = Start(open_state(path), latest.warnings)
    if not ours and named.step >= max_steps:
        raise UserError(
            f"run.resume: {path} has done {named.step} steps, and train.max_steps is {max_steps}. Raise it."
        )
    if latest.step > named.step:
        raise UserError(
            f"run.resume: {path} is older than {step_directory(own, latest.step).name} of the same run, and the next "
            "start would continue from that. Move what is newer away, or set run.resume: auto."
        )
    return named


def claim(directory: Path) -> IO[str]:
    """Make the directory and lock it for this job; the lock lasts as long as the returned file is open.

    Raises:
        UserError: it cannot be written, or another job is training in it.
    """
    try:
        (directory / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK) or not os.access(directory / CHECKPOINTS, os.W_OK):
            raise PermissionError(None, "not writable")
        file = (directory / LOCK).open("a+")
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                if not lock(file, wait=False):
                    print(
                        f"warning: run.dir: {directory} is on a disk without file locks, so nothing keeps a second job "
                        "out of it. Start no two.",
                        file=sys.stderr,
                        flush=True,
                    )
                settle(directory / CHECKPOINTS)
                file.truncate(0)
                file.write(f"process {os.getpid()} of {socket.gethostname()}, since {time.time_ns()}\n")
                file.flush()
                os.fsync(file.fileno())  # the ranks of other hosts read it: they see the same directory, or another
                return file
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"run.dir: {directory} is in use by another job ({owner(directory).rpartition(',')[0]}). Stop "
                        "it, or choose another directory."
                    ) from None
                time.sleep(0.5)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"run.dir: {directory} cannot be used: {told(error)}. Choose another directory.") from error


def owner(directory: Path) -> str:
    """What the job that holds the directory wrote about itself; empty where no job of this directory can be seen."""
    try:
        return (directory / LOCK).read_text(errors="replace").strip()
    except OSError:
        return ""


def begin(config: RunConfig, deepspeed_config: dict[str, Any]) -> None:
    """Write what the run was told, defaults and all, and say, durably, that it goes on.

    Raises:
        UserError: the disk refuses.
    """
    directory = config.run.dir
    try:
        _replace(directory / CONFIG, resolved_yaml(config))
        _replace(directory / DEEPSPEED, json.dumps(deepspeed_config, indent=2, default=str) + "\n")
        if (directory / COMPLETE).exists():
            (directory / COMPLETE).unlink()
            sync_directory(directory)
    except OSError as error:
        raise UserError(f"run.dir: {directory} cannot be written: {told(error)}.") from error


def mark_complete(directory: Path, step: int, patience: int = 0) -> None:
    """Say, durably, that the run has reached its last step, or, after so many measurements, its patience; call it last.

    Raises:
        UserError: the disk refuses.
    """
    text = json.dumps({"step": step, **({"early_stopping_patience": patience} if patience else {})}) + "\n"
    path = directory / COMPLETE
    try:
        if not path.is_file() or path.read_text() != text:
            _replace(path, text)
    except OSError as error:
        raise UserError(f"run.dir: {directory} cannot be written: {told(error)}.") from error


def _replace(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text)
