"""What a step counts before its first forward, and what it tells after its last.

When a loss or the gradient is not finite on any rank, no rank's weights move: DeepSpeed (0.19.8) computes the
gradient's norm over all ranks and all experts between the last backward pass and the optimizer, in every ZeRO stage and
precision, and leaves the update out when it is not finite: weights and moments stay as they are. So it is enough to see
to it that a bad loss cannot hide behind a finite gradient, and that what was accumulated is gone (`was_skipped`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ds_dgemma.data.batch import Batch
from ds_dgemma.engine.deepspeed_engine import was_skipped
from ds_dgemma.ranks.layout import RankLayout, sum_over_ranks
from ds_dgemma.run.utilisation import Utilisation
from ds_dgemma.tracking.metrics import StepMetrics


@dataclass(frozen=True)
class Update:
    """A step that was made, or left out."""

    metrics: StepMetrics
    skipped: bool  # by all ranks: a number was not finite
    micro_batches: list[Batch]  # this rank's
    losses: list[torch.Tensor]  # of each: loss as differentiated, diffusion nll, AR nll, router loss


class Counts(NamedTuple):
    """Of the whole global batch: a token counts the same on every rank."""

    tokens: float
    diffusion: float  # supervised tokens of the chosen canvases
    ar: float  # targets of the encoder
    work: float  # useful FLOPs


def count(micro_batches: Sequence[Batch], ranks: RankLayout, utilisation: Utilisation) -> Counts:
    """Count the global batch; a collective."""
    counts = [(batch.tokens(), *batch.counts()) for batch in micro_batches]
    totals = [*(float(sum(column)) for column in zip(*counts, strict=True)), utilisation.work(micro_batches)]
    return Counts(*sum_over_ranks(totals, ranks.device))


def spoil_if_not_finite(loss: torch.Tensor) -> torch.Tensor:
    """The loss, bit for bit; where it is not finite its gradient is not either. Waits for no device."""
    return loss / loss.detach().isfinite()


class Summed(NamedTuple):
    """What came of a step, over all ranks."""

    diffusion_nll: float
    ar_nll: float
    router: float
    skipped: bool  # the update, by every rank


def summed(engine: Any, step: int, losses: Sequence[torch.Tensor], ranks: RankLayout) -> Summed:
    """Sum the micro-batches' losses over ranks; a collective.

    Raises:
        RuntimeError: some ranks left the update out, and others did not.
    """
    sums = torch.stack(list(losses)).double().sum(0).tolist()
    _, diffusion_nll, ar_nll, router, skipped = sum_over_ranks([*sums, was_skipped(engine)], ranks.device)
    if skipped not in (0, ranks.world):
        raise RuntimeError(f"step {step}: {skipped:.0f} of {ranks.world} ranks skipped the update, so weights differ.")
    return Summed(diffusion_nll, ar_nll, router, skipped > 0)
