"""Which checkpoints of a run stay: the newest, those at an interval, and the best by validation loss.

A checkpoint's state.json has the loss of its own step, where that was validated, and the best of the run so far; so
what is best survives a resume, and a look at the directory is enough to choose.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_dgemma.checkpoint.run_state import Checkpoint, open_checkpoint, step_directories
from ds_dgemma.checkpoint.save import OLD, PARTIAL
from ds_dgemma.config import CheckpointSection
from ds_dgemma.errors import UserError

METRIC = "validation/loss"


@dataclass
class Scores:
    """The validation losses of a run, so far as they are kept; `on` names the held-out data, for other data is another
    measure.
    """

    on: str | None
    best: dict[str, Any] | None = None
    last: dict[str, Any] | None = None

    @classmethod
    def continued(cls, on: str | None, checkpoint: Checkpoint | None) -> "Scores":
        """Those of a run that starts, or goes on from a checkpoint."""
        best = checkpoint.state.get("best") if checkpoint else None
        return cls(on, best if best and best["on"] == on else None)

    def add(self, step: int, loss: float) -> None:
        """Take the loss of a step; one that is not a number is never the best."""
        if not math.isfinite(loss):
            return
        self.last = {"metric": METRIC, "value": loss, "step": step, "on": self.on}
        if self.best is None or loss < self.best["value"]:
            self.best = self.last

    def facts(self, step: int) -> dict[str, Any]:
        """What a checkpoint of this step keeps of them."""
        own = self.last if self.last and self.last["step"] == step else None
        return {"score": own, "best": self.best}


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
    """The step of the lowest validation loss of which a complete checkpoint is there."""
    best = _by_loss(_complete(root))
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
    return kept + _by_loss(whole)[: policy.keep_best]


def _by_loss(whole: list[Checkpoint]) -> list[Checkpoint]:
    """Those with a validation loss on what the newest of them was validated on, the best first."""
    scored = [checkpoint for checkpoint in whole if checkpoint.state.get("score")]
    alike = [checkpoint for checkpoint in scored if checkpoint.state["score"]["on"] == scored[-1].state["score"]["on"]]
    return sorted(alike, key=lambda checkpoint: checkpoint.state["score"]["value"])
