"""Our parameters and buffers <-> transformers' tensors: one table, both directions.

Ours are named as below transformers' `model.decoder.`, with three exceptions: DeepSpeed's expert layer keeps gate and
up apart (w1, w3; w2 is down) and only this rank's experts; the encoder's layer scalar sits beside the decoder's; and
a vision embedding that is trained is the encoder's.
"""

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ds_dgemma.model.spec import DECODER, ENCODER

DECODER_LAYERS, ENCODER_LAYERS = f"{DECODER}layers.", f"{ENCODER}layers."
EMBED_VISION = "embed_vision."
ENCODER_EMBED_VISION = "model.encoder.embed_vision."
_EXPERT = re.compile(r"(?P<layer>layers\.\d+\.experts)\.experts\.(?P<part>w1|w2|w3)$")
_EXPERT_ADAPTER = re.compile(r"(?P<layer>layers\.\d+\.experts)\.experts\.(?P<part>(?:gate_up|down)_proj\.lora_[AB])$")
_ENCODER_SCALAR = re.compile(r"layers\.(\d+)\.encoder_layer_scalar$")


@dataclass(frozen=True)
class Place:
    """Where a tensor of ours lies in the checkpoint: `tensor[experts, rows]`, all of it when both are None."""

    tensor: str
    experts: tuple[int, int] | None = None
    rows: tuple[int, int] | None = None

    def view_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of this part of a tensor of `shape`."""
        if self.experts is None:
            return shape
        assert self.rows is not None
        return (self.experts[1] - self.experts[0], self.rows[1] - self.rows[0], *shape[2:])


def is_expert(name: str) -> bool:
    """Whether this parameter is split over expert-parallel ranks."""
    return _EXPERT.search(name) is not None or _EXPERT_ADAPTER.search(name) is not None


def is_adapter(name: str) -> bool:
    """Whether this parameter is a factor of an adapter rather than the checkpoint's."""
    return name.endswith((".lora_A", ".lora_B"))


def checkpoint_name(name: str) -> str:
    """The name that people know a parameter by: its tensor's in the checkpoint, or an adapter's beside it."""
    name = name.removeprefix("model.")
    if match := _EXPERT.match(name):
        tensor = "down_proj" if match["part"] == "w2" else "gate_up_proj"
        return f"{DECODER}{match['layer']}.{tensor}"
    if match := _EXPERT_ADAPTER.match(name):
        return f"{DECODER}{match['layer']}.{match['part']}"
    return _outer_name(name)


def _outer_name(name: str) -> str:
    if name.startswith(EMBED_VISION):
        return ENCODER_EMBED_VISION + name.removeprefix(EMBED_VISION)
    return DECODER + name


def adapter_state_name(factor: str) -> str:
    """What the training state calls a factor that is `factor` below `model.decoder.`"""
    return "model." + re.sub(r"^(layers\.\d+\.experts)\.", r"\1.experts.", factor)


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a pattern covers from end to end: a glob, or a regular expression after `re:`. A weight that
    encoder and decoder share is covered by either's name for it.
    """
    expression = re.compile(
        pattern.removeprefix("re:") if pattern.startswith("re:") else fnmatch.translate(pattern), re.DOTALL
    )
    return [name for name in names if any(map(expression.fullmatch, (name, *_shared_as(name))))]


def _shared_as(name: str) -> tuple[str, ...]:
    """The names under which transformers has the same weight once more."""
    if not re.match(r"model\.decoder\.(layers|embed_tokens|norm)\.", name) or name.endswith(".layer_scalar"):
        return ()
    output = ("lm_head.weight",) if name == DECODER + "embed_tokens.weight" else ()
    return (ENCODER + name.removeprefix(DECODER), *output)


def place_of(name: str, shape: tuple[int, ...], expert_rank: int = 0) -> Place:
    """Where the parameter or buffer `name` of local `shape` lies; `name` may start with the objective's `model.`."""
    name = name.removeprefix("model.")
    if match := _ENCODER_SCALAR.match(name):
        return Place(f"{ENCODER_LAYERS}{match[1]}.layer_scalar")
    if match := _EXPERT.match(name):
        experts = (expert_rank * shape[0], (expert_rank + 1) * shape[0])
        tensor = "down_proj" if match["part"] == "w2" else "gate_up_proj"
        first = shape[1] if match["part"] == "w3" else 0
        return Place(f"{DECODER}{match['layer']}.{tensor}", experts, (first, first + shape[1]))
    return Place(_outer_name(name))


def places_of(stack: nn.Module, expert_rank: int = 0) -> dict[str, Place]:
    """Where every parameter and buffer of a stack lies that is on meta still."""
    return {
        name: place_of(name, tuple(tensor.shape), expert_rank)
        for name, tensor in [*stack.named_parameters(), *stack.named_buffers()]
        if tensor.is_meta
    }


def tied_to(tensor: str) -> str | None:
    """The tensor whose values transformers gives this one, so that a checkpoint need not store it; None for all others.

    Source: `_tied_weights_keys` in transformers `modeling_diffusion_gemma.py`.
    """
    if tensor == "lm_head.weight":
        return DECODER + "embed_tokens.weight"
    if tensor.startswith(ENCODER) and not tensor.endswith(".layer_scalar"):
        return DECODER + tensor.removeprefix(ENCODER)
    return None


def sources_of(tensor: str) -> tuple[str, ...] | None:
    """Our parameters that make up a checkpoint tensor, in the order of its rows; None for what we do not train
    (the vision tower, buffers).
    """
    if tensor.startswith(ENCODER_EMBED_VISION):
        return (f"model.{EMBED_VISION}{tensor.removeprefix(ENCODER_EMBED_VISION)}",)
    if not tensor.startswith(DECODER) or tensor.endswith(".layer_scalar"):
        return None
    name = "model." + tensor.removeprefix(DECODER)
    if name.endswith(".experts.gate_up_proj"):
        stem = name.removesuffix("gate_up_proj") + "experts."
        return (stem + "w1", stem + "w3")
    if name.endswith(".experts.down_proj"):
        return (name.removesuffix("down_proj") + "experts.w2",)
    return (name,)
