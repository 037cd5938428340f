"""What a canvas token's cross-entropy counts for, and which distribution it is of: both functions of the noise level t.

With K tokens in the vocabulary, alpha = 1 - t the chance that a token was kept, f the capped logits, x the noised
token that the model sees in its place:

    base                        -log softmax(f)[target]
    reweighted                  the same times -alpha' / alpha = 1 / (1 - t), at most 100 (the ELBO has 1 / K beside
                                it, where it cancels; here it would only make the loss K times smaller)
    leave_one_out               -log softmax(f + shift * onehot(x))[target], shift = log(1 + K * alpha / (1 - alpha))
    reweighted_leave_one_out    both

The shift is Bayes' rule: whoever sees x at its place knows that it was kept with probability alpha, or drawn, x or any
other, with (1 - alpha) / K. Added by the loss it need not be learned, and f learns what the other tokens say of the
target, the leave-one-out posterior. A new loss is a row of LOSSES, its name in `config/run.py` (LossName), and a test.

Shapes: N canvas tokens; level_N fp32 in [0, 1]. Sources: Gourevitch et al., arXiv 2605.22765; Rhine-AI-Lab
`diffusion-gemma-sft` `sft_loss.py` and NVIDIA Megatron-Bridge `diffusion_loss_variant`, where the largest weight is a
setting that is off by default; gemma/diffusion `hackable_diffusion_adapter/hd/sft_model.py`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ds_dgemma.config.run import LossName

LARGEST_WEIGHT = 100.0
# A draw of a generator is zero or more than this; K over it is a number in fp32.
LEAST_LEVEL = 2.0**-53


def inverse_kept(level_N: Tensor) -> Tensor:
    """1 / (1 - t), at most LARGEST_WEIGHT."""
    return (1 - level_N).reciprocal().clamp(max=LARGEST_WEIGHT)


def kept_over_drawn(level_N: Tensor, vocab_size: int) -> Tensor:
    """log(1 + K * alpha / (1 - alpha)), nats: 0 at t = 1, about log(K / t) at small t."""
    return torch.log1p(vocab_size * ((1 - level_N) / level_N.clamp(min=LEAST_LEVEL)))


class Loss(NamedTuple):
    """One of the losses."""

    weight: Callable[[Tensor], Tensor] = torch.ones_like  # of the level
    shift: Callable[[Tensor, int], Tensor] | None = None  # of the level and K: nats for the noised token's logit


LOSSES: dict[LossName, Loss] = {
    "base": Loss(),
    "reweighted": Loss(weight=inverse_kept),
    "leave_one_out": Loss(shift=kept_over_drawn),
    "reweighted_leave_one_out": Loss(inverse_kept, kept_over_drawn),
}
