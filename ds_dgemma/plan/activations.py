"""What layers keep for the backward pass, traced on meta: `sweep.LayerPass` itself reads, denoises and computes again.

Storages that its graph saves, and those that it holds, are counted: so the count follows the modules, adapters and
attention included, at no cost. One part is written out: what the routed experts keep on AutoEP's grouped path, which
depends on the routing.

Shapes: N tokens of a call, H hidden, k experts per token, F an expert's intermediate. Sources: deepspeed 0.19.8
`module_inject/auto_ep_layer.py` (`_forward`, `combine_from_routed`), `moe/ep_experts.py`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ds_dgemma.model.parts import Canvas
from ds_dgemma.model.spec import text_spec
from ds_dgemma.model.stack import DiffusionGemmaStack, SweepLayer
from ds_dgemma.model.sweep import Call, Calls, Checkpointing, LayerPass, Places, make_calls
from ds_dgemma.plan.setup import Shape

FP32 = 4


@dataclass(frozen=True)
class Kept:
    """Bytes of one layer and example under one kind of activation checkpointing."""

    read: int  # after clean tokens and first guesses
    denoised: int  # after the canvases: until the backward pass
    again: int  # what the backward pass computes again and keeps for itself


@dataclass(frozen=True)
class LayerActivations:
    """Bytes that one layer keeps for one example, and those that it needs for a moment."""

    kept: dict[Checkpointing, Kept]  # without the experts' rows
    is_last: bool  # then its graph is kept in any case
    rows: int  # experts: a row's bytes that are kept
    returned: int  # experts: bytes kept for each row that comes back to its token
    combining: int  # experts: bytes for each row while outputs are weighted and summed
    travelling: int  # experts: bytes of one row on its way to another rank


@dataclass(frozen=True)
class StackActivations:
    """Of one example."""

    layers: tuple[LayerActivations, ...]
    routed_rows: int  # N * k
    read_rows: int  # of these, clean tokens'


def trace(stack: DiffusionGemmaStack, shape: Shape, dtype: torch.dtype) -> StackActivations:
    """Trace layers that are alike once for one example; `stack`, on meta and its experts placed, is cast to `dtype`."""
    text, layers, traced = text_spec(stack.config), [], {}
    stack.to(dtype)
    calls = _calls(stack, shape, text.hidden_size, dtype)
    for number, (kind, layer) in enumerate(zip(stack.layer_types, stack.sweep_layers(), strict=True), start=1):
        is_last = number == len(stack.layer_types)
        alike = (kind, is_last, *((name, p.requires_grad) for name, p in layer.named_parameters()))
        if alike not in traced:
            window = stack.window if kind == "sliding_attention" else None
            kept = {
                how: _kept(
                    LayerPass(layer, replace(calls, checkpointing=how), window, is_last, True), text.hidden_size, dtype
                )
                for how in get_args(Checkpointing)
            }
            traced[alike] = _with_experts(kept, is_last, layer, text, dtype.itemsize)
        layers.append(traced[alike])
    return StackActivations(tuple(layers), shape.tokens * text.top_k_experts, shape.clean * text.top_k_experts)


def _calls(stack: DiffusionGemmaStack, shape: Shape, hidden_size: int, dtype: torch.dtype) -> Calls:
    """The calls of a micro-batch of one example with one first guess."""
    canvases = [Canvas(0, start) for start in shape.starts]
    places = Places.on("meta", (shape.clean,), canvases, shape.canvas_length, guessed=(shape.canvases - 1,))
    calls = make_calls(stack, places, False, torch.empty(1, hidden_size, dtype=dtype, device="meta"))
    # A dropout by parts draws from generators, which meta has not; torch's own keeps as much.
    named = {field.name: getattr(calls, field.name) for field in fields(calls)}
    return replace(calls, **{n: replace(call, dropout=None) for n, call in named.items() if isinstance(call, Call)})


def _kept(layer_pass: LayerPass, hidden_size: int, dtype: torch.dtype) -> Kept:
    """Let a layer go its way through a micro-batch and count what is there after each visit, its output left out, which
    is the next layer's input.
    """

    def inputs(call: Call) -> Tensor:
        return torch.empty(1, len(call.is_canvas_N1), hidden_size, dtype=dtype, device="meta")

    layer, calls = layer_pass.layer, layer_pass.calls
    clean, guess, canvas, both = map(inputs, (calls.clean, calls.guesses, calls.canvases, calls.all))
    others = {_key(tensor) for tensor in (*layer.parameters(), *layer.buffers(), *_tensors(calls))}
    experts, layer.experts = layer.experts, _UncountedExperts()
    try:
        with _saved() as saved, torch.no_grad():
            layer_pass.read(clean, guess)
            read = _bytes([clean, *saved, *_held(layer_pass)], others | _outputs(layer_pass))
            layer_pass.denoise(canvas)
            denoised = _bytes([clean, canvas, *saved, *_held(layer_pass)], others | _outputs(layer_pass))
        if layer_pass.keeps_graph:
            return Kept(read, denoised, 0)
        with _saved() as saved:
            layer_pass.again(both.requires_grad_())
        return Kept(read, denoised, _bytes(saved, others | {_key(both)}))
    finally:
        layer.experts = experts


def _outputs(layer_pass: LayerPass) -> set[int]:
    return {_key(done.hidden_1NH) for _, done in layer_pass.graph}


def _held(layer_pass: LayerPass) -> Iterator[Tensor]:
    return _tensors([layer_pass.seen, layer_pass.chosen, layer_pass.known, layer_pass.graph])


@contextmanager
def _saved() -> Iterator[list[Tensor]]:
    """The tensors that autograd saves within."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def _tensors(held: Any) -> Iterator[Tensor]:
    """All tensors in dataclasses, dicts and sequences."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict):
        yield from _tensors(list(held.values()))
    elif isinstance(held, list | tuple):
        for member in held:
            yield from _tensors(member)
    elif is_dataclass(held):
        yield from _tensors([getattr(held, field.name) for field in fields(held)])


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensors: Iterable[Tensor], left_out: set[int]) -> int:
    """Bytes of the distinct storages behind tensors."""
    sizes = {_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for key, size in sizes.items() if key not in left_out)


def _with_experts(
    kept: dict[Checkpointing, Kept], is_last: bool, layer: SweepLayer, text: Any, size: int
) -> LayerActivations:
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
        is_last=is_last,
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
