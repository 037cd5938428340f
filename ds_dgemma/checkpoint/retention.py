"""Which checkpoints of a run stay: the newest, those at an interval, and the best by a measure of validation or
evaluation; and whether that still gets better.

A checkpoint's state.json has the measure of its own step, where that was taken, and the best of the run so far; so what
is best survives a resume, and a look at the directory is enough to choose.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_dgemma.checkpoint.run_state import Checkpoint, open_checkpoint, step_directories
from ds_dgemma.checkpoint.save import OLD, PARTIAL
from ds_dgemma.config.run import CheckpointSection
from ds_dgemma.errors import UserError

LOWER_IS_BETTER = ("loss", "steps_per_canvas")  # how such measures' names begin; of shares more is better


@dataclass
class Scores:
    """A measure of a run, so far as it is kept; `on` names the held-out data, for other data is another measure."""

    metric: str  # "validation/loss", "evaluation/solved", ...
    on: str | None
    best: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    since: int = 0  # measurements after the best

    @classmethod
    def continued(cls, metric: str, on: str | None, checkpoint: Checkpoint | None) -> "Scores":
        """Those of a run that starts, or goes on from a checkpoint."""
        state = checkpoint.state if checkpoint else {}
        best = state.get("best")
        if not best or (best["metric"], best["on"]) != (metric, on):
            return cls(metric, on)
        return cls(metric, on, best, since=state.get("since_best", 0))

    def add(self, kind: str, step: int, measured: Mapping[str, Any]) -> None:
        """Take what validation or evaluation, its `kind`, measured at a step; what is no number is never the best."""
        if not self.metric.startswith(f"{kind}/"):
            return
        share = measured[self.metric.removeprefix(f"{kind}/")]
        value = math.nan if share is None else float(share)  # None: of no example
        self.since += 1
        if not math.isfinite(value):
            return
        self.last = {"metric": self.metric, "value": value, "step": step, "on": self.on}
        if self.best is None or _rank(self.last) < _rank(self.best):
            self.best, self.since = self.last, 0

    def told(self) -> str:
        """Why nothing better is waited for."""
        best = f"{self.best['value']:.4f} at step {self.best['step']}" if self.best else "no number so far"
        return f"{self.metric} was best with {best}, and {self.since} measurements since were not better"

    def facts(self, step: int) -> dict[str, Any]:
        """What a checkpoint of this step keeps of them."""
        own = self.last if self.last and self.last["step"] == step else None
        return {"score": own, "best": self.best, "since_best": self.since}


def _rank(score: dict[str, Any]) -> float:
    """Lower is better."""
    lower = score["metric"].split("/", 1)[1].startswith(LOWER_IS_BETTER)
    return score["value"] if lower else -score["value"]


def prune(root: Path, step: int, policy: CheckpointSection) -> None:
    """Remove what is not to be kept now that the checkpoint of `step` is written, and the debris of killed writers.

    That one always stays. Newer ones are what this run did not continue from: they were damaged. A disk that refuses is
    not an error: the next time will do.
    """
    whole = _complete(root)
    if not any(checkpoint.step == step for checkpoint in whole):
        return
    kept = {checkpoint.path for checkpoint in _kept(whole, step, policy)}
    debris = [path for ending in (PARTIAL, OLD) for path in root.glob(f"step-*{ending}")]
    for path in [*(path for _, path in step_directories(root) if path not in kept), *debris]:
        shutil.rmtree(path, ignore_errors=True)


def best_step(root: Path) -> int | None:
    """The step of the best measure of which a complete checkpoint is there."""
    best = _by_score(_complete(root))
    return best[0].step if best else None


def _complete(root: Path) -> list[Checkpoint]:
    """What is complete by names and sizes, oldest first."""
    found = []
    for _, path in step_directories(root):
        try:
            found.append(open_checkpoint(path))
        except UserError:
            continue
    return found


def _kept(whole: list[Checkpoint], step: int, policy: CheckpointSection) -> list[Checkpoint]:
    whole = [checkpoint for checkpoint in whole if checkpoint.step <= step]
    kept = whole[-policy.keep_last :]
    if policy.keep_every:
        kept += [checkpoint for checkpoint in whole if checkpoint.step % policy.keep_every == 0]
    return kept + _by_score(whole)[: policy.keep_best]


def _by_score(whole: list[Checkpoint]) -> list[Checkpoint]:
    """Those with the measure that the newest of them has, on the same held-out data, the best first."""
    scores = [(checkpoint, score) for checkpoint in whole if (score := checkpoint.state.get("score"))]
    last = scores[-1][1] if scores else {}
    alike = [pair for pair in scores if (pair[1]["metric"], pair[1]["on"]) == (last["metric"], last["on"])]
    return [checkpoint for checkpoint, _ in sorted(alike, key=lambda pair: _rank(pair[1]))]
