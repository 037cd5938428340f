"""How evenly routers spread tokens over experts, and the loss that evens it out.

Switch Transformer's auxiliary loss (Fedus et al., arXiv 2101.03961, equations 4 to 6) for top-k routing, as
transformers' `load_balancing_loss_func` (models/mixtral) has it, DiffusionGemma having none of its own: a layer's is
E * sum over experts of f P, with f the tokens that chose an expert over all tokens, P its mean probability; k when
all is even. The function there pools all layers before it multiplies, so that one layer's crowding can hide another's;
here, as in the paper, each layer has its loss, and the mean over layers is taken.

f and P are of the whole batch, not means of its parts': that is another loss. f has no gradient. Shapes: N tokens,
L layers, E experts, k experts per token.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class ExpertLoads:
    """Filled by a sweep: what the tokens of a micro-batch, clean ones and canvases, asked of every layer's experts."""

    layers: list[Tensor] = field(default_factory=list)  # one [2, E] a layer, by `expert_load`

    def tokens_LE(self) -> Tensor:
        """Tokens that chose an expert, fp32."""
        return torch.stack([load[0] for load in self.layers]).detach()

    def probability_LE(self) -> Tensor:
        """An expert's probability, summed over tokens; has a gradient."""
        return torch.stack([load[1] for load in self.layers])


def weights_of(router: Any, probability_NE: Tensor, chosen_Nk: Tensor) -> Tensor:
    """The routing weights [N, k] of a choice that was made before, as transformers' router makes them of its own."""
    weights = probability_NE.gather(-1, chosen_Nk)
    return weights / weights.sum(-1, keepdim=True) * router.per_expert_scale[chosen_Nk]


def expert_load(probability_NE: Tensor, chosen_Nk: Tensor) -> Tensor:
    """Per expert the tokens that chose it and the sum of its probability over tokens, [2, E]."""
    one_each = torch.ones_like(probability_NE[:1, 0]).expand(chosen_Nk.numel())
    tokens_E = torch.zeros_like(probability_NE[0]).index_add(0, chosen_Nk.flatten(), one_each)
    return torch.stack([tokens_E, probability_NE.sum(0)])


def balance_loss(probability_LE: Tensor, tokens_of_batch_LE: Tensor, top_k: int) -> Tensor:
    """A micro-batch's part of the loss, given the counts of the whole batch; the parts add up to the whole's."""
    tokens_L1 = tokens_of_batch_LE.sum(-1, keepdim=True) / top_k
    layers, experts = probability_LE.shape
    return (tokens_of_batch_LE / tokens_L1 * probability_LE / tokens_L1).sum() * experts / layers
