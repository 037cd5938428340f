"""The routers' load-balance loss over a whole optimizer batch: every rank's tokens, every micro-batch's."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_dgemma.objective.denoising import RouterBalance
from ds_dgemma.ranks.layout import RankLayout


def router_balance(engine: Any, micro_batches: Sequence[Any], ranks: RankLayout, weight: float) -> RouterBalance | None:
    """What the objective needs for it; None when the weight is 0. A collective.

    The loss of a micro-batch needs the counts of all. With one, they are summed over ranks within its forward; with
    more, they are counted first: a forward without gradient for each.
    """
    if not weight:
        return None
    share = weight * ranks.world * len(micro_batches)
    if len(micro_batches) == 1:
        return RouterBalance(share, _over_ranks)
    counted: list[Tensor] = []

    def count(tokens_LE: Tensor) -> Tensor:
        counted.append(tokens_LE)
        return tokens_LE

    engine.eval()
    with torch.no_grad():
        for batch in micro_batches:
            engine(batch.to(ranks.device), None, RouterBalance(0.0, count))
    engine.train()
    total = _over_ranks(torch.stack(counted).sum(0))
    return RouterBalance(share, lambda tokens_LE: total)


def _over_ranks(tokens_LE: Tensor) -> Tensor:
    total = tokens_LE.clone()
    dist.all_reduce(total)
    return total
