"""The training loss on held-out examples, with the same noise in every run, at every step and on any number of
ranks.
"""

from collections.abc import Callable, Sequence

import torch

from ds_dgemma.data.batch import Batch, Example
from ds_dgemma.engine.ranks import RankLayout, sum_over_ranks
from ds_dgemma.objective.denoising import TokenWeights, mean

FIXED_EPOCH = -1  # no training epoch: its draws are validation's own


@torch.no_grad()
def validate(
    engine: torch.nn.Module,
    examples: Sequence[Example],
    collate: Callable[[list[tuple[Example, int]]], Batch],
    micro_batch_size: int,
    ranks: RankLayout,
    encoder_loss_weight: float,
) -> dict[str, float]:
    """Return loss, loss_diffusion and loss_ar, means over the tokens of all examples; a collective."""
    engine.eval()
    sums = [0.0] * 4
    stride = micro_batch_size * ranks.world
    for start in range(0, len(examples), stride):
        first = start + ranks.rank * micro_batch_size
        mine = range(first, first + micro_batch_size)
        # Every rank runs every pass: past the end it repeats the last example, and nothing of that counts.
        batch = collate([(examples[min(i, len(examples) - 1)], FIXED_EPOCH) for i in mine])
        batch = batch.counting([i < len(examples) for i in mine])
        parts = engine(batch.to(ranks.device), TokenWeights(1.0, 1.0))
        for i, value in enumerate((parts.diffusion_nll, parts.ar_nll, *batch.counts())):
            sums[i] += float(value)
    engine.train()
    diffusion_nll, ar_nll, diffusion_tokens, ar_tokens = sum_over_ranks(sums, ranks.device)
    diffusion, ar = mean(diffusion_nll, diffusion_tokens), mean(ar_nll, ar_tokens)
    return {"loss": diffusion + encoder_loss_weight * ar, "loss_diffusion": diffusion, "loss_ar": ar}
