"""Attention kernels: a rectangle or a causal square of attention without a mask, forward with its normaliser, and
backward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ATEN: Any = torch.ops.aten


@dataclass(frozen=True)
class Kernel:
    """One way to compute it."""

    name: str
    # query [b, h, T, d], key, value [b, g, U, d], causal (then T = U), scale -> output, normaliser [b, h, T]
    forward: Callable[..., tuple[Tensor, Tensor]]
    # gradient of the output, query, key, value, output, normaliser, causal, scale -> gradients of query, key, value
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _cpu_forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return _ATEN._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)


def _cpu_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    backward = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(grad, query, key, value, out, log, 0.0, causal, scale=scale)


CPU = Kernel("sdpa", _cpu_forward, _cpu_backward)


def kernel_for(query: Tensor) -> Kernel:
    """The kernel for these queries."""
    return CPU
