"""The run directory: it belongs to one config and to one running job, and says where the run stands.

config.yaml     resolved settings      deepspeed.json  what DeepSpeed was told
metrics.jsonl   one object a step      checkpoints/    step-NNNNNN/
run.lock        held by rank 0 while the run is alive
"""

import fcntl
import json
import os
import time
from pathlib import Path
from typing import IO, Any

from ds_dgemma.checkpoint.run_state import Checkpoint, newest, open_checkpoint
from ds_dgemma.config import RunConfig
from ds_dgemma.config_file import read_yaml, resolved_yaml, same_run_problems
from ds_dgemma.errors import UserError, one_line_each

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
LOCK = "run.lock"
LOCK_SECONDS = 20  # the ranks of a launcher that was killed need a moment to notice


def find_start(config: RunConfig) -> tuple[Checkpoint | None, list[str]]:
    """Which checkpoint to continue from (None: from the model), and warnings; changes nothing but an empty
    directory's existence.

    Raises:
        UserError: the directory cannot be written, belongs to another config, or holds nothing to continue from
        that is whole.
    """
    directory = config.run.dir
    try:
        (directory / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"run.dir: {directory} cannot be created: {error.strerror}. Choose another directory."
        ) from error
    if not os.access(directory, os.W_OK) or not os.access(directory / CHECKPOINTS, os.W_OK):
        raise UserError(f"run.dir: {directory} is not writable. Choose another directory, or change its permissions.")
    used = (directory / CONFIG).is_file()
    if used and config.run.resume == "never":
        raise UserError(
            f"run.dir: {directory} holds a run, and run.resume is never. Choose another run.dir, or resume."
        )
    if used and (problems := same_run_problems(read_yaml(directory / CONFIG), config)):
        advice = "Choose another run.dir for another run, or set these back."
        raise one_line_each(f"{directory}, which belongs to another config", [*problems, advice][:21])
    if not used and any((directory / CHECKPOINTS).glob("step-*")):
        raise UserError(
            f"run.dir: {directory} has checkpoints but no {CONFIG}: it is not a run of ours. Choose another."
        )
    if config.run.resume in ("auto", "never"):
        return newest(directory / CHECKPOINTS)
    return open_checkpoint(Path(config.run.resume)), []


def claim(config: RunConfig, deepspeed_config: dict[str, Any]) -> IO[str]:
    """Lock the directory for this job and write its settings; the lock lasts as long as the returned file is open.

    Raises:
        UserError: another job is training in it.
    """
    directory = config.run.dir
    lock = (directory / LOCK).open("a+")
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"run.dir: {directory} is in use by another job. Stop it, or choose another directory."
                ) from error
            time.sleep(0.5)
    _replace(directory / CONFIG, resolved_yaml(config))
    _replace(directory / "deepspeed.json", json.dumps(deepspeed_config, indent=2, default=str) + "\n")
    return lock


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text)
    beside.replace(path)
