"""Checkpoints in the course of a run."""

from typing import Any

from ds_dgemma.checkpoint.retention import prune
from ds_dgemma.checkpoint.save import NotWritten, save
from ds_dgemma.config.recorded import CHECKPOINTS
from ds_dgemma.config.run import RunConfig
from ds_dgemma.engine.optimizer_state import adam_step, owned_shards
from ds_dgemma.ranks.layout import RankLayout
from ds_dgemma.tracking.sinks import Tracker


def keep(
    engine: Any, step: int, config: RunConfig, ranks: RankLayout, facts: dict[str, Any], tracker: Tracker, must: bool
) -> None:
    """Write a checkpoint with `facts`, and remove those that the config does not keep; a collective.

    Raises:
        NotWritten: on every rank, when the run may not go on without it: `must`, or as the config says.
    """
    checkpoints = config.run.dir / CHECKPOINTS
    try:
        save(checkpoints, step, owned_shards(engine, ranks), ranks.rank, {**facts, "adam_step": adam_step(engine)})
    except NotWritten as error:  # on every rank
        if must or config.checkpoint.on_error == "stop":
            raise
        tracker.track({"kind": "checkpoint_failed", "step": step, "error": f"{error} The run goes on."})
    else:
        if ranks.is_main:
            prune(checkpoints, step, config.checkpoint)
