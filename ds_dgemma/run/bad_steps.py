"""What follows a skipped step: it is counted, told, and written down to be replayed; too many in a row end the run."""

import math
from collections.abc import Mapping
from typing import Any

from ds_dgemma.checkpoint.run_state import Checkpoint
from ds_dgemma.config.run import RunConfig
from ds_dgemma.data.batch import Batch
from ds_dgemma.data.order import Item
from ds_dgemma.data.stream import Stream
from ds_dgemma.data.streaming import StreamedBatches
from ds_dgemma.errors import BadNumbers, told
from ds_dgemma.ranks.layout import RankLayout, gather
from ds_dgemma.run.directory import CONFIG
from ds_dgemma.run.replay_file import (
    SeenExample,
    SeenMicroBatch,
    SkippedStep,
    checkpoints_until,
    write_skipped,
)
from ds_dgemma.run.step import Update
from ds_dgemma.tracking.sinks import Tracker

SHOWN_EXAMPLES = 8

UNKNOWN = Item(-1, -1)  # an example of a stream


class BadSteps:
    """Looks at every step. The count in a row goes into checkpoints: a resumed run ends where it would have ended."""

    def __init__(
        self,
        config: RunConfig,
        ranks: RankLayout,
        stream: Stream | StreamedBatches,
        facts: Mapping[str, Any],
        resumed: Checkpoint | None,
        tracker: Tracker,
    ) -> None:
        self._config, self._ranks, self._stream, self._facts = config, ranks, stream, facts
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
        checkpoint = next(iter(checkpoints_until(self._config.run.dir, step - 1)), None)
        if checkpoint is None and self._resumed is not None:  # of another run
            checkpoint = self._resumed.path
        begun = int(checkpoint.name.removeprefix("step-")) if checkpoint else 0
        return SkippedStep(
            step=step,
            seed=self._config.seed,
            problem="loss" if any(one.bad for one in seen) else "gradient",
            config=self._config.run.dir / CONFIG,
            model_digest=self._facts["model_digest"],
            data_digest=self._facts["data_digest"],
            checkpoint=checkpoint,
            steps_after_checkpoint=step - 1 - begun,
            micro_batches=tuple(seen),
        )

    def _seen(self, done: Update) -> list[SeenMicroBatch]:
        """This rank's micro-batches."""
        shares = self._stream.shares(done.metrics.step - 1)
        seen = []
        for number, batch in enumerate(done.micro_batches):
            share = shares[number] if shares else [UNKNOWN] * len(batch.documents)
            loss, diffusion_nll, ar_nll, router = done.losses[number].tolist()
            examples = [_seen_example(batch, document, *item) for document, item in enumerate(share)]
            seen.append(
                SeenMicroBatch(
                    rank=self._ranks.rank,
                    micro_batch=number,
                    bad=not all(map(math.isfinite, (loss, diffusion_nll, ar_nll, router))),
                    loss=loss,
                    diffusion_nll=diffusion_nll,
                    ar_nll=ar_nll,
                    examples=tuple(examples),
                )
            )
        return seen


def _seen_example(batch: Batch, document: int, index: int, epoch: int) -> SeenExample:
    canvases = batch.canvases_of(document)
    return SeenExample(
        id=batch.sample_ids[document],
        index=index,
        epoch=epoch,
        canvases=tuple(batch.canvases[number][1] for number in canvases),
        noise_levels=tuple(batch.noise_levels[number] for number in canvases),
        self_conditioning=tuple(batch.self_condition_C[canvases].tolist()),
    )


def tell(skipped: SkippedStep) -> dict[str, str]:
    """What was not finite, and where."""
    if skipped.problem == "gradient":
        return {"problem": "the gradient of a finite loss", "where": "unknown, ds-dgemma replay tells"}
    values = sorted({str(one.loss) for one in skipped.bad})
    where = []
    for one in skipped.bad:
        ids = [str(example.id) for example in one.examples]
        more = f" and {len(ids) - SHOWN_EXAMPLES} more" if len(ids) > SHOWN_EXAMPLES else ""
        where.append(f"{one.name}, examples {' '.join(ids[:SHOWN_EXAMPLES])}{more}")
    return {"problem": f"the loss ({', '.join(values)})", "where": "; ".join(where)}
