"""What follows a skipped step: it is counted, told, and written down to be replayed; too many in a row end the run."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from ds_dgemma.checkpoint.run_state import Checkpoint, newest_until
from ds_dgemma.config.recorded import CHECKPOINTS
from ds_dgemma.config.run import RunConfig
from ds_dgemma.errors import BadNumbers, told
from ds_dgemma.ranks.layout import RankLayout, gather
from ds_dgemma.run.replay_file import SeenMicroBatch, SkippedStep, write_skipped
from ds_dgemma.run.step import Update
from ds_dgemma.tracking.sinks import Tracker

SHOWN_EXAMPLES = 8


class BadSteps:
    """Looks at every step. The count in a row goes into checkpoints: a resumed run ends where it would have ended."""

    def __init__(
        self,
        config: RunConfig,
        ranks: RankLayout,
        facts: Mapping[str, Any],
        resumed: Checkpoint | None,
        tracker: Tracker,
    ) -> None:
        self._config, self._ranks, self._facts = config, ranks, facts
        self._resumed, self._tracker = resumed, tracker
        self._in_a_row: int = resumed.state.get("bad_steps_in_a_row", 0) if resumed else 0

    def facts(self) -> dict[str, int]:
        """What a checkpoint keeps of them."""
        return {"bad_steps_in_a_row": self._in_a_row}

    def check(self, done: Update) -> None:
        """Nothing for a step that was made; a collective for one that was skipped.

        Raises:
            BadNumbers: on every rank, when it was one too many.
        """
        if not done.skipped:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        seen = [one for of_rank in gather(self._seen(done), self._ranks) for one in of_rank]
        ending = self._write_down(done.metrics.step, seen) if self._ranks.is_main else ""
        if self._in_a_row >= self._config.health.max_bad_steps:
            raise BadNumbers(
                f"stopped at step {done.metrics.step}: NaN or infinity in {self._in_a_row} steps in a row, all of them "
                f"skipped (health.max_bad_steps). {ending}"
            )

    def _write_down(self, step: int, seen: list[SeenMicroBatch]) -> str:
        """Write the replay file and the record; return what a run that ends here says of both."""
        skipped = self._skipped(step, seen)
        try:
            file = str(write_skipped(skipped, self._config.run.dir))
        except OSError as error:  # the run does not need it
            file = f"not written, {told(error)}"
        record = {"kind": "skipped", "step": step, **tell(skipped), "in_a_row": self._in_a_row, "replay": file}
        self._tracker.track(record)
        weights = skipped.checkpoint or f"none, the weights are still those of {self._config.model.path}"
        return f"Last checkpoint: {weights}. The last batch, for ds-dgemma replay: {file}."

    def _skipped(self, step: int, seen: list[SeenMicroBatch]) -> SkippedStep:
        checkpoint = newest_until(self._config.run.dir / CHECKPOINTS, step - 1)
        if checkpoint is None and self._resumed is not None:  # of another run
            checkpoint = self._resumed.path
        return SkippedStep(
            step=step,
            problem="loss" if any(one.bad for one in seen) else "gradient",
            ranks=self._ranks.world,
            micro_batch_size=self._config.train.micro_batch_size,
            model_digest=self._facts["model_digest"],
            data_digest=self._facts["data_digest"],
            checkpoint=checkpoint,
            micro_batches=tuple(seen),
        )

    def _seen(self, done: Update) -> list[SeenMicroBatch]:
        """This rank's micro-batches."""
        losses = torch.stack(done.losses).tolist()
        return [
            SeenMicroBatch(
                rank=self._ranks.rank,
                micro_batch=number,
                bad=not all(map(math.isfinite, values)),
                loss=values[0],
                examples=batch.sample_ids,
            )
            for number, (batch, values) in enumerate(zip(done.micro_batches, losses, strict=True))
        ]


def tell(skipped: SkippedStep) -> dict[str, str]:
    """What was not finite, and where."""
    if skipped.problem == "gradient":
        return {"problem": "the gradient of a finite loss", "where": "unknown, ds-dgemma replay tells"}
    bad = [seen for seen in skipped.micro_batches if seen.bad]
    values = sorted({str(one.loss) for one in bad})
    where = []
    for one in bad:
        ids = list(map(str, one.examples))
        more = f" and {len(ids) - SHOWN_EXAMPLES} more" if len(ids) > SHOWN_EXAMPLES else ""
        where.append(f"{one.name}, examples {' '.join(ids[:SHOWN_EXAMPLES])}{more}")
    return {"problem": f"the loss ({', '.join(values)})", "where": "; ".join(where)}
