"""Validation and evaluation in the course of a run."""

from typing import Any

from ds_dgemma.config.run import RunConfig
from ds_dgemma.evaluation.validation import validate
from ds_dgemma.ranks.layout import RankLayout
from ds_dgemma.run.prepare import Prepared
from ds_dgemma.tracking.sinks import Tracker


def measure(engine: Any, step: int, config: RunConfig, ranks: RankLayout, prepared: Prepared, tracker: Tracker) -> None:
    """Measure what is due after a step, track it, and add it to the scores; step 0 is validated only. A collective."""
    last = step == config.train.max_steps
    if prepared.held_out and (not step or last or due(step, config.validation.every)):
        vocabulary = engine.module.vocab_size
        losses = validate(engine, prepared.held_out, vocabulary, config, ranks, prepared.images)
        tracker.track({"kind": "validation", "step": step, **losses})
        if step:
            prepared.scores.add("validation", step, losses)
    if prepared.exam and step and (last or due(step, config.evaluation.every)):
        shares = prepared.exam.take(engine, ranks)
        tracker.track({"kind": "evaluation", "step": step, **shares})
        if "failed" not in shares:
            prepared.scores.add("evaluation", step, shares)


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after this one."""
    return every > 0 and step % every == 0
