"""What autograd keeps of a layer for its backward pass, traced on meta with transformers' own modules.

A layer runs on meta tensors, and the bytes that it saves are counted: so the count follows the modules, adapters
included, at no cost. Two parts can't run there and are written out: attention (what the memory-efficient kernel keeps
on a GPU) and the routed experts (what AutoEP's grouped path keeps, which depends on the routing).

Shapes: B examples, T tokens of one (clean and canvases), H hidden, k experts per token, F an expert's intermediate,
R rows that a rank's experts receive. Sources: torch `aten/native/transformers/attention.cpp`; deepspeed 0.19.8
`module_inject/auto_ep_layer.py` (`_forward`, `combine_from_routed`), `moe/ep_experts.py`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from ds_dgemma.model.spec import text_spec
from ds_dgemma.model.stack import DiffusionGemmaStack, SweepLayer

_ATTENTION = "ds_dgemma_plan"
FP32 = 4


@dataclass(frozen=True)
class LayerActivations:
    """Bytes that one layer keeps for one example, and those that it needs for a moment."""

    kept: int  # without the experts' rows
    rows: int  # experts: a row's bytes that are kept
    returned: int  # experts: bytes kept for each row that comes back to its token
    combining: int  # experts: bytes for each row while outputs are weighted and summed
    travelling: int  # experts: bytes of one row on its way to another rank


@dataclass(frozen=True)
class StackActivations:
    """Bytes of one example: layers in order, and what lies between them."""

    layers: tuple[LayerActivations, ...]
    hidden: int  # a layer's input, all that activation checkpointing keeps of it
    masks: int  # shared by all layers
    routed_rows: int  # T * k


def trace(stack: DiffusionGemmaStack, tokens: int, dtype: torch.dtype) -> StackActivations:
    """Trace layers that are alike once for one example of `tokens`; `stack`, on meta and its experts placed, is cast to
    `dtype`.
    """
    text, layers, traced = text_spec(stack.config), [], {}
    before = text._attn_implementation
    AttentionInterface.register(_ATTENTION, _efficient_attention)
    text._attn_implementation = _ATTENTION
    try:
        for kind, layer in zip(stack.layer_types, stack.sweep_layers(), strict=True):
            alike = (kind, *((name, p.requires_grad) for name, p in layer.named_parameters()))
            if alike not in traced:
                kept = _kept_bytes(layer, text.hidden_size, tokens, dtype)
                traced[alike] = _with_experts(kept, layer, text, dtype.itemsize)
            layers.append(traced[alike])
    finally:
        text._attn_implementation = before
    return StackActivations(
        layers=tuple(layers),
        hidden=tokens * text.hidden_size * dtype.itemsize,
        masks=len(set(stack.layer_types)) * tokens**2,
        routed_rows=tokens * text.top_k_experts,
    )


def _kept_bytes(layer: SweepLayer, hidden_size: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the distinct storages that a layer's graph holds, its arguments and parameters left out."""
    head_dim: Any = layer.self_attn.head_dim
    experts, layer.experts = layer.experts, _UncountedExperts()
    layer.to(dtype)
    with torch.device("meta"):
        hidden = torch.empty(1, tokens, hidden_size, dtype=dtype, requires_grad=True)
        cos, sin = (torch.empty(1, tokens, head_dim, dtype=dtype) for _ in range(2))
        mask = torch.empty(1, 1, tokens, tokens, dtype=torch.bool)
        is_canvas = torch.empty(1, tokens, dtype=torch.bool)
    arguments = (hidden, cos, sin, mask, is_canvas)
    given = {t.untyped_storage()._cdata for t in (*arguments, *layer.parameters(), *layer.buffers())}
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in given:
            kept[storage._cdata] = (tensor, storage.nbytes())  # the reference keeps the address from reuse
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(*arguments)
    layer.experts = experts
    return sum(size for _, size in kept.values())


def _with_experts(kept: int, layer: SweepLayer, text: Any, size: int) -> LayerActivations:
    """Add what the routed experts keep: a row's input and inner activation only where a weight that reads it is
    trained, and what lies between the factors of an adapter.
    """
    H, F = text.hidden_size, text.moe_intermediate_size
    trained = {name.removeprefix("experts."): p for name, p in layer.experts.named_parameters() if p.requires_grad}
    reads_input = any(name.startswith(("w1", "w3", "gate_up_proj")) for name in trained)
    reads_inner = any(name.startswith(("w2", "down_proj")) for name in trained)
    ranks = sum(factor.shape[-2] for name, factor in trained.items() if name.endswith("lora_A"))
    return LayerActivations(
        kept=kept,
        rows=size * (3 * F + H * reads_input + F * reads_inner + ranks),  # gate, up and gelu(gate) always
        returned=size * H + 2 * 8,  # weighted by the router's scores; two orders, int64
        combining=(FP32 + size) * H,
        travelling=size * H,
    )


class _UncountedExperts(nn.Module):
    """Stands for the routed experts; keeps nothing."""

    def forward(self, hidden_NH: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        # Depends on the routing weights, as the experts' output does, so that the router's graph is kept.
        return _Through.apply(hidden_NH, top_k_weights)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weights: Tensor) -> Tensor:
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class _EfficientAttention(torch.autograd.Function):
    """Keeps what the memory-efficient kernel keeps: queries, expanded keys and values, mask, output, normaliser."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        out = torch.empty_like(query)
        additive = torch.empty(mask.shape, dtype=query.dtype, device="meta")
        normaliser = torch.empty(query.shape[:-1], dtype=torch.float32, device="meta")
        ctx.save_for_backward(query, key, value, additive, out, normaliser)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return query, key, value, None


def _efficient_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **_: Any
) -> tuple[Tensor, None]:
    groups = module.num_key_value_groups
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    return _EfficientAttention.apply(query, key, value, attention_mask).transpose(1, 2), None
