"""Every parameter that a run would hold, counted on the model itself: built on meta exactly as training builds it.

So a count cannot drift from what is trained. One inventory serves every topology: experts are placed at expert
parallel 1, and a rank of EP n holds 1/n of each of their tensors.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from transformers import DiffusionGemmaConfig

from ds_dgemma.config.run import RunConfig
from ds_dgemma.engine.adapters import adapt_experts, choose_adapters
from ds_dgemma.engine.expert_parallel import place_experts
from ds_dgemma.engine.private import is_expert_parameter
from ds_dgemma.engine.trainable import freeze
from ds_dgemma.model.build import build_stack
from ds_dgemma.model.flops import VOCABULARY, Products, products_of, unit_of
from ds_dgemma.model.lora import adapt_linears
from ds_dgemma.model.spec import text_spec
from ds_dgemma.model.stack import DiffusionGemmaStack


@dataclass(frozen=True)
class Parameter:
    """One logical tensor: for experts, all of them."""

    name: str
    numel: int
    is_expert: bool
    is_trained: bool
    shape: tuple[int, ...]
    unit: str  # what ZeRO-3 gathers at once: "layers.3", "embed_tokens", ...


@dataclass(frozen=True)
class Inventory:
    """A model's parameters and the numbers of its config that sizes depend on."""

    parameters: tuple[Parameter, ...]
    products: Products
    text: Any  # transformers' text config
    canvas_length: int
    outside: dict[str, int]  # elements of what an export carries over: the vision tower, which images need
    patch: int  # numbers of an image's patch
    stored: torch.dtype  # of the checkpoint to start from, as its config says

    @cached_property
    def units(self) -> dict[str, tuple[Parameter, ...]]:
        """Parameters by the unit that is gathered together, in the model's order."""
        units: dict[str, list[Parameter]] = {}
        for parameter in self.parameters:
            units.setdefault(parameter.unit, []).append(parameter)
        return {name: tuple(members) for name, members in units.items()}

    @cached_property
    def total(self) -> int:
        """Parameters that a run loads."""
        return sum(parameter.numel for parameter in self.parameters)

    @cached_property
    def trained(self) -> int:
        """Parameters that get gradients."""
        return sum(parameter.numel for parameter in self.parameters if parameter.is_trained)

    @cached_property
    def untrained_copy(self) -> int:
        """Parameters that an export carries over."""
        return sum(self.outside.values())

    @cached_property
    def vocabulary(self) -> Parameter:
        """The tied embedding matrix."""
        return next(p for p in self.parameters if p.unit == VOCABULARY)


def build_stack_for(config: RunConfig, spec: DiffusionGemmaConfig) -> DiffusionGemmaStack:
    """The stack as training would have it, frozen and adapted, at expert parallel 1 and with meta parameters.

    Raises:
        UserError: patterns of `model.freeze` or `lora` that do not fit the model.
    """
    trains = config.model.train_vision_embedding
    stack = build_stack(spec, train_router=config.model.train_router, train_vision_embedding=trains)
    place_experts(stack, size=1, rank=0, grouped=False)
    freeze(stack, config.model.freeze, list(stack.outside))
    if config.lora is not None:
        adapters = choose_adapters(stack, config.lora, grouped_matmul=config.parallel.grouped_matmul != "off")
        adapt_linears(stack, adapters.targets, config.lora)
        adapt_experts(stack, adapters.targets, config.lora)
    return stack


def take_inventory(stack: DiffusionGemmaStack) -> Inventory:
    """Count every parameter of a stack that was built at expert parallel 1."""
    spec = stack.config
    canvas_length = spec.canvas_length
    assert isinstance(canvas_length, int)
    return Inventory(
        parameters=tuple(
            Parameter(
                name=name,
                numel=parameter.numel(),
                is_expert=is_expert_parameter(parameter),
                is_trained=parameter.requires_grad,
                shape=tuple(parameter.shape),
                unit=unit_of(name),
            )
            for name, parameter in stack.named_parameters()
        ),
        products=products_of(stack),
        text=text_spec(spec),
        canvas_length=canvas_length,
        patch=3 * spec.vision_config.patch_size**2,  # type: ignore[union-attr]
        outside={name: prod(shape) for name, shape in stack.outside.items()},
        stored=spec.dtype if isinstance(spec.dtype, torch.dtype) else torch.float32,
    )
