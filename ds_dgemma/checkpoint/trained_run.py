"""A run as it lies on disk: what it started from, and what it has trained so far."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ds_dgemma.checkpoint.retention import best_step
from ds_dgemma.checkpoint.run_state import StateReader, newest, open_state, step_directory
from ds_dgemma.checkpoint.same import check_same_model
from ds_dgemma.checkpoint.weights import local_directory, model_digest
from ds_dgemma.config.recorded import CHECKPOINTS, CONFIG, recorded_config
from ds_dgemma.config.run import LoraSection
from ds_dgemma.errors import UserError


@dataclass(frozen=True)
class Run:
    """A run's checkpoint, and what it belongs to."""

    base: str  # the model that it started from, as its config says it
    revision: str | None  # of a model on the hub
    model: Path  # where that lies
    bf16: bool  # computed in bf16
    lora: LoraSection | None
    trained: StateReader


def open_run(run_dir: Path, step: int | Literal["best"] | None) -> Run:
    """Open a run's checkpoint: the newest, of a step, or the best.

    Raises:
        UserError: no such run or checkpoint, or a model that is gone or has changed since.
    """
    path = run_dir / CONFIG
    if not path.is_file():
        raise UserError(f"--run {run_dir} is no run directory: it has no {CONFIG}.")
    config = recorded_config(path)
    checkpoints = run_dir / CHECKPOINTS
    if step == "best" and (step := best_step(checkpoints)) is None:
        raise UserError(
            f"--step best: no checkpoint of {run_dir} has what best_by measures. Give a number, or leave it out."
        )
    if step is None:
        trained, problems = newest(checkpoints)
        for problem in problems:
            print(f"warning: {problem}", file=sys.stderr)
    else:
        if not step_directory(checkpoints, step).is_dir():
            there = ", ".join(sorted(path.name for path in checkpoints.glob("step-*"))) or "none"
            raise UserError(f"--step {step}: {run_dir} has no such checkpoint. It has: {there}.")
        trained = open_state(step_directory(checkpoints, step))
    if trained is None:
        raise UserError(f"--run {run_dir} has no checkpoint yet.")
    try:
        model = local_directory(config.model.path, config.model.revision)
    except UserError as error:
        from_here = Path(config.model.path).is_absolute() or config.model.revision is not None
        hint = "" if from_here else f" Is it relative to another folder than {Path.cwd()}? Start there."
        raise UserError(f"{run_dir} started from a model that is gone. {error}{hint}") from error
    source, bf16 = config.model, config.train.precision == "bf16"
    check_same_model(source.path, model_digest(model), trained.checkpoint)
    return Run(source.path, source.revision, model, bf16, config.lora, trained)
