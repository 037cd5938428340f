"""transformers' RMS norm with the same weight, in fewer passes over memory.

    y = x / sqrt(mean(x^2) + eps) * weight, in fp32 at least, cast back at the end

A layer has eleven of them, and written out in torch's operations one reads and writes its input a dozen times forward
and backward. On a GPU torch has a fused kernel; elsewhere the backward pass is written out here:

    r = (mean(x^2) + eps)^-1/2     dx = r g w - x r^3 / d (g x) w     dw = sum over rows of r g x

Shapes: R rows, d features. Source: transformers `DiffusionGemmaRMSNorm`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaRMSNorm


class RMSNorm(nn.Module):
    """Takes the place of transformers' module, its parameter included."""

    weight: nn.Parameter | None
    is_literal = False  # of all norms: operation by operation as transformers, whose rounding generation repeats

    def __init__(self, source: DiffusionGemmaRMSNorm) -> None:
        super().__init__()
        self.eps = source.eps
        self.register_parameter("weight", source.weight if source.with_scale else None)

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last dimension."""
        if RMSNorm.is_literal:
            normed = hidden.float() * torch.pow(hidden.float().pow(2).mean(-1, keepdim=True) + self.eps, -0.5)
            return (normed if self.weight is None else normed * self.weight.float()).type_as(hidden)
        if hidden.is_cuda:
            return F.rms_norm(hidden, hidden.shape[-1:], self.weight, self.eps)
        return _Norm.apply(hidden, self.weight, self.eps)


@contextmanager
def literal_norms() -> Iterator[None]:
    """Norms to the last bit as transformers computes them, without a gradient."""
    RMSNorm.is_literal = True
    try:
        yield
    finally:
        RMSNorm.is_literal = False


def replace_norms(module: nn.Module) -> None:
    """Replace every norm of transformers below `module`."""
    for name, child in module.named_children():
        if isinstance(child, DiffusionGemmaRMSNorm):
            setattr(module, name, RMSNorm(child))
        else:
            replace_norms(child)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        x = hidden.to(torch.promote_types(hidden.dtype, torch.float32)).flatten(0, -2)
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        y = x * r
        if weight is not None:
            y.mul_(weight)
        ctx.save_for_backward(hidden, weight, r)
        return y.to(hidden.dtype).view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, weight, r = ctx.saved_tensors
        x, g = hidden.to(r.dtype).flatten(0, -2), grads[0].to(r.dtype).flatten(0, -2)
        gx = g * x
        d_weight = None
        if weight is None:
            s, d_hidden = gx.sum(-1, keepdim=True), g * r
        else:
            s, d_hidden = gx @ weight.to(r.dtype).unsqueeze(-1), g * weight
            d_hidden.mul_(r)
            if ctx.needs_input_grad[1]:
                d_weight = (r.t() @ gx).view_as(weight).to(weight.dtype)
        d_hidden.addcmul_(x, r.pow(3).mul_(s).div_(x.shape[-1]), value=-1)
        return d_hidden.to(hidden.dtype).view_as(hidden), d_weight, None
