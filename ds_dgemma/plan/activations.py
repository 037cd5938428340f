"""What layers keep for the backward pass, traced on meta: `sweep.LayerPass` itself reads, denoises and computes again.

The tensors that live on after a visit are counted: so the count follows the modules, adapters and attention included,
at no cost. Written out is what the routed experts keep on AutoEP's grouped path, which depends on the routing.

Shapes: N tokens of a call, H hidden, k experts per token, F an expert's intermediate. Sources: deepspeed 0.19.8
`module_inject/auto_ep_layer.py` (`_forward`, `combine_from_routed`), `moe/ep_experts.py`.
"""

from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ds_dgemma.model.parts import Canvas
from ds_dgemma.model.spec import text_spec
from ds_dgemma.model.stack import DiffusionGemmaStack, SweepLayer
from ds_dgemma.model.sweep import Checkpointing, LayerPass, Places, make_calls
from ds_dgemma.plan.setup import Shape


@dataclass(frozen=True)
class Kept:
    """Bytes that one layer keeps, for one example, and for each row of a routed expert."""

    stored: int  # from the canvases' visit to the backward pass
    again: int  # what the backward pass computes again and keeps for itself; 0: nothing, all is stored, rows too
    row: int  # where the expert is
    returned: int  # where it came back to its token


Activations = dict[Checkpointing, Kept]


def trace(stack: DiffusionGemmaStack, shape: Shape, dtype: torch.dtype) -> list[Activations]:
    """Trace layers that are alike once for one example, in `dtype`; `stack`, on meta, is of no use after that."""
    stack.to(dtype)
    stack.has_dropout = False  # ours draws from generators, which meta has not; torch's own keeps as much
    canvases = [Canvas(0, start) for start in shape.starts]
    places = Places.on("meta", (shape.clean,), canvases, shape.canvas_length, guessed=(shape.canvases - 1,))
    calls = make_calls(stack, places, False, torch.empty(1, dtype=dtype, device="meta"))
    layers, traced = [], {}
    for number, (kind, layer) in enumerate(zip(stack.layer_types, stack.sweep_layers(), strict=True), start=1):
        is_last = number == len(stack.layer_types)  # its graph is kept in any case: the backward pass begins there
        alike = (kind, is_last, *((name, p.requires_grad) for name, p in layer.named_parameters()))
        if alike not in traced:
            rows = _of_a_row(layer, text_spec(stack.config), dtype.itemsize)
            layer.experts = _UncountedExperts()
            window = stack.window if kind == "sliding_attention" else None
            traced[alike] = {
                how: Kept(
                    *_visit(LayerPass(layer, replace(calls, checkpointing=how), window, is_last, True), dtype), *rows
                )
                for how in get_args(Checkpointing)
            }
        layers.append(traced[alike])
    return layers


def _visit(layer_pass: LayerPass, dtype: torch.dtype) -> tuple[int, int]:
    """Let a layer go its way through a micro-batch: what it stored and computed again. Its output is left out, which is
    the next layer's input.
    """
    calls, H = layer_pass.calls, layer_pass.layer.input_layernorm.weight.numel()
    clean, guess, canvas, both = (
        torch.empty(1, len(call.is_canvas_N1), H, dtype=dtype, device="meta")
        for call in (calls.clean, calls.guesses, calls.canvases, calls.all)
    )
    with _Tensors() as made, torch.no_grad():
        layer_pass.read(clean, guess)
        layer_pass.denoise_canvases(canvas)
        stored = made.bytes
    if layer_pass.keeps_graph:
        return stored, 0  # with the outputs, as large as the inputs, which were there before
    with _Tensors() as made:
        done = layer_pass.again(both.requires_grad_())
        return stored + both.nbytes, made.bytes - done.hidden_1NH.nbytes


class _Tensors(TorchDispatchMode):
    """The tensors that are made within."""

    def __init__(self) -> None:
        super().__init__()
        self._made = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = _storages((args, kwargs))
        self._made.update({storage: None for storage in _storages(output) if storage not in given})
        return output

    @property
    def bytes(self) -> int:
        """Of those that are still there."""
        return sum(storage.nbytes() for storage in self._made)


def _storages(tensors: Any) -> list[torch.UntypedStorage]:
    return [tensor.untyped_storage() for tensor in tree_leaves(tensors) if isinstance(tensor, Tensor)]


def _of_a_row(layer: SweepLayer, text: Any, size: int) -> tuple[int, int]:
    """Bytes that the routed experts keep of a row, where they are and at its token: its input and inner activation only
    where a weight that reads it is trained, and what lies between the factors of an adapter.
    """
    H, F = text.hidden_size, text.moe_intermediate_size
    trained = {name.removeprefix("experts."): p for name, p in layer.experts.named_parameters() if p.requires_grad}
    reads_input = any(name.startswith(("w1", "w3", "gate_up_proj")) for name in trained)
    reads_inner = any(name.startswith(("w2", "down_proj")) for name in trained)
    ranks = sum(factor.shape[-2] for name, factor in trained.items() if name.endswith("lora_A"))
    row = size * (3 * F + H * reads_input + F * reads_inner + ranks)  # gate, up and gelu(gate) always
    return row, size * H + 2 * 8  # weighted by the router's scores; two orders, int64


class _UncountedExperts(nn.Module):
    """Stands for the routed experts; keeps nothing."""

    def forward(self, hidden_NH: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        # Depends on the routing weights, as the experts' output does, so that the router's graph is kept.
        return hidden_NH + top_k_weights[:, :1].to(hidden_NH.dtype)
