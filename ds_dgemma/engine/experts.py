"""The experts that a rank holds: rows, sorted by expert, through each expert's MLP, with an adapter beside it or not.

DeepSpeed's module keeps the weights (w1 gate, w3 up, w2 down) and chooses the kernel: torch's grouped product,
Triton's, or a loop. W + B A of an adapter is never made: a row is multiplied with its expert's W, and with its A and
then its B, by the same kernel. The loop is ours: DeepSpeed's takes each expert's matrix out of the stack, and torch's
backward pass of that makes a zeroed gradient of all experts for each one of them.

Shapes: R rows, e experts of this rank, H hidden, F intermediate. Source: deepspeed 0.19.8 `moe/ep_experts.py`.
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from deepspeed.moe.ep_experts import GroupedExperts, apply_expert_activation
from torch import Tensor

from ds_dgemma.config.run import LoraSection
from ds_dgemma.engine.private import EXPERT_TAGS, shape_of
from ds_dgemma.model.kernels import in_vectors
from ds_dgemma.model.lora import Adapter, Target

Product = Callable[[Tensor, Tensor], Tensor]


class Experts(GroupedExperts):
    """Takes the place of DeepSpeed's, its parameters and their tags included."""

    def __init__(self, base: GroupedExperts) -> None:
        experts, inner, hidden = shape_of(base.w1)
        super().__init__(
            hidden,
            inner,
            experts,
            use_grouped_mm=base.use_grouped_mm,
            disable_triton_grouped_mm=not base.use_triton_grouped_mm,
            activation=base.activation,
            activation_alpha=base.activation_alpha,
            activation_limit=base.activation_limit,
        )
        self.w1, self.w2, self.w3 = base.w1, base.w2, base.w3
        self.gate_up_proj: Adapter | None = None
        self.down_proj: Adapter | None = None

    def adapt(self, target: Target, lora: LoraSection) -> None:
        """Put an adapter beside one tensor of the experts.

        Its factors are tagged as AutoEP tags the weights, so that ZeRO shares them among the ranks that hold the same
        experts and reduces their gradients there; untagged they would be averaged over ranks that hold others.
        """
        adapter = Adapter(target, lora, shape_of(self.w1)[0])
        for factor in adapter.parameters():
            for tag in EXPERT_TAGS:
                setattr(factor, tag, getattr(self.w1, tag))
        setattr(self, target.name.rpartition(".")[2], adapter)

    def forward(self, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        """Rows [R, H] to rows [R, H]; rows behind the last expert's are padding."""
        product = self._product(num_tokens_per_expert)
        gate, up = product(x, self.w1), product(x, self.w3)
        if self.gate_up_proj is not None:
            for_gate, for_up = self.gate_up_proj(x, product).chunk(2, dim=-1)
            gate, up = gate + for_gate, up + for_up
        settings = (self.activation, self.activation_alpha, self.activation_limit)
        inner = apply_expert_activation(gate, up, *settings, fused=x.is_cuda and self.use_grouped_mm)
        output = product(inner, self.w2)
        return output if self.down_proj is None else output + self.down_proj(inner, product)

    def _product(self, counts: Tensor) -> Product:
        """How each expert's rows are multiplied with its own weight [out, in] of [e, out, in]."""
        if not self.use_grouped_mm:
            ends = list(accumulate(counts.tolist()))
            return lambda rows, weight: _Loop.apply(rows, weight.to(rows.dtype), ends)
        offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
        return partial(_triton if self.use_triton_grouped_mm else grouped, offsets=offsets)


class _Loop(torch.autograd.Function):
    """One product an expert, each written where it belongs."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.ends = ends
        output = rows.new_empty(len(rows), weight.shape[1])
        for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            torch.mm(rows[start:end], weight[expert].t(), out=output[start:end])
        output[ends[-1] :] = 0
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        rows, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        d_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for expert, (start, end) in enumerate(zip([0, *ctx.ends], ctx.ends, strict=False)):
            if d_rows is not None:
                torch.mm(grad[start:end], weight[expert], out=d_rows[start:end])
            if d_weight is not None:
                torch.mm(grad[start:end].t(), rows[start:end], out=d_weight[expert])
        if d_rows is not None:
            d_rows[ctx.ends[-1] :] = 0
        return d_rows, d_weight, None


def grouped(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows [R, in] of each expert on its weight of [e, out, in]; what the kernel reads begins at 16 bytes."""
    # ZeRO-3 gathers a layer's parameters one behind another: after one of an odd size, a weight begins anywhere
    return torch._grouped_mm(rows, in_vectors(weight.to(rows.dtype)).transpose(-2, -1), offs=offsets)


def _triton(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    from deepspeed.ops.triton_ops.group_gemm_triton import group_gemm_triton  # needs Triton, so a GPU

    return group_gemm_triton(rows, weight.to(rows.dtype), offsets, trans_b=True)
