"""Attention with its normaliser, and its backward pass, as the formulas have them: every score at once, in fp32."""

import torch
from torch import Tensor

from ds_dgemma.model.kernels import Grads, Kernel


def _scores(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
    scores = scale * query @ key.transpose(-2, -1)
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    return scores.masked_fill(~seen.tril(), -torch.inf) if causal else scores


def _wide(query: Tensor, *keys: Tensor) -> list[Tensor]:
    groups = query.shape[1] // keys[0].shape[1]
    return [query.float(), *(tensor.float().repeat_interleave(groups, dim=1) for tensor in keys)]


def forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output [b, h, T, d] and normaliser [b, h, T]."""
    query, key, value = _wide(query, key, value)
    scores = _scores(query, key, causal, scale)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log: Tensor, causal: bool, scale: float
) -> Grads:
    """Gradients of a part, for the output and the normaliser of the whole."""
    kv_heads = key.shape[1]
    query, key, value = _wide(query, key, value)
    grad = grad.float()
    weights = (_scores(query, key, causal, scale) - log.float().unsqueeze(-1)).exp()
    by_weight = grad @ value.transpose(-2, -1) - (grad * out.float()).sum(-1, keepdim=True)
    by_score = scale * weights * by_weight
    d_key, d_value = by_score.transpose(-2, -1) @ query, weights.transpose(-2, -1) @ grad
    groups = [tensor.unflatten(1, (kv_heads, -1)).sum(2) for tensor in (d_key, d_value)]
    return by_score @ key, groups[0], groups[1]


EXACT = Kernel("fp32, every score", forward, backward)
