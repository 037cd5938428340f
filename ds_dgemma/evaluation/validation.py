"""The loss on held-out examples over a grid of noise levels, with the same noise in every run, at every step and on any
number of ranks.
"""

from collections.abc import Sequence
from functools import partial

import torch

from ds_dgemma.config.run import RunConfig
from ds_dgemma.data.batch import Example
from ds_dgemma.data.image_files import ImageFiles
from ds_dgemma.objective.collate import collate
from ds_dgemma.objective.corruption import NoiseGrid
from ds_dgemma.objective.denoising import TokenWeights, mean
from ds_dgemma.ranks.layout import RankLayout, sum_over_ranks

FIXED_EPOCH = -1  # no training epoch: its draws are validation's own


@torch.no_grad()
def validate(
    engine: torch.nn.Module,
    examples: Sequence[Example],
    vocab_size: int,
    config: RunConfig,
    ranks: RankLayout,
    images: ImageFiles | None = None,
) -> dict[str, float]:
    """Return loss, loss_diffusion, loss_ar and accuracy (share of canvas tokens whose likeliest id is the right one),
    means over the tokens of all examples; loss_diffusion and accuracy also at each level; a collective.
    """
    levels, micro_batch_size = config.validation.noise_levels, config.train.micro_batch_size
    make = partial(collate, NoiseGrid(config.objective, config.seed, vocab_size, levels), images=images)
    engine.eval()
    of_ar, of_levels = torch.zeros(2, dtype=torch.float64), torch.zeros(3, len(levels), dtype=torch.float64)
    stride = micro_batch_size * ranks.world
    for start in range(0, len(examples), stride):
        first = start + ranks.rank * micro_batch_size
        mine = range(first, first + micro_batch_size)
        # Every rank runs every pass: past the end it repeats the last example, and nothing of that counts.
        batch = make([(examples[min(i, len(examples) - 1)], FIXED_EPOCH) for i in mine])
        batch = batch.counting([i < len(examples) for i in mine])
        parts = engine(batch.to(ranks.device), TokenWeights(1.0, 1.0))
        _, ar_tokens = batch.counts()
        of_ar += torch.tensor([float(parts.ar_nll), ar_tokens], dtype=torch.float64)
        tokens_1C = batch.canvas_weight_CL.double().sum(-1, keepdim=True).t()
        of_canvases = torch.cat([parts.by_canvas_2C.double().cpu(), tokens_1C])
        of_levels += of_canvases.unflatten(1, (-1, len(levels))).sum(1)
    engine.train()
    ar_nll, ar_tokens, *flat = sum_over_ranks([*of_ar.tolist(), *of_levels.flatten().tolist()], ranks.device)
    nll, right, tokens = (flat[row * len(levels) : (row + 1) * len(levels)] for row in range(3))
    diffusion, ar = mean(sum(nll), sum(tokens)), mean(ar_nll, ar_tokens)
    return {
        "loss": diffusion + config.objective.encoder_loss_weight * ar,
        "loss_diffusion": diffusion,
        "loss_ar": ar,
        "accuracy": mean(sum(right), sum(tokens)),
        **{f"loss_diffusion_at_{level:g}": mean(nll[n], tokens[n]) for n, level in enumerate(levels)},
        **{f"accuracy_at_{level:g}": mean(right[n], tokens[n]) for n, level in enumerate(levels)},
    }
