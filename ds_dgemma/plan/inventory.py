"""Every parameter that a run would hold, counted on the model itself: built on meta exactly as training builds it.

So a count cannot drift from what is trained. One inventory serves every topology: experts are placed at expert
parallel 1, and a rank of EP n holds 1/n of each of their tensors.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

from transformers import DiffusionGemmaConfig

from ds_dgemma.config.run import RunConfig
from ds_dgemma.engine.adapters import adapt_experts, choose_adapters
from ds_dgemma.engine.expert_parallel import place_experts
from ds_dgemma.engine.private import is_expert_parameter
from ds_dgemma.model.build import build_stack
from ds_dgemma.model.flops import Products, products_of, unit_of
from ds_dgemma.model.lora import adapt_linears
from ds_dgemma.model.spec import text_spec
from ds_dgemma.model.stack import DiffusionGemmaStack
from ds_dgemma.model.trainable import freeze


@dataclass(frozen=True)
class Parameter:
    """One logical tensor: for experts, all of them."""

    name: str
    unit: str  # what ZeRO-3 gathers at once: "layers.3", "embed_tokens", ...
    shape: tuple[int, ...]
    numel: int
    is_expert: bool
    is_trained: bool


@dataclass(frozen=True)
class Inventory:
    """A model's parameters and the numbers of its config that sizes depend on."""

    parameters: list[Parameter]
    trained: list[Parameter]  # those that get gradients
    count: int  # elements of all
    trained_count: int
    outside: int  # elements that a run leaves as they are: the vision tower, which images need
    products: Products
    text: Any  # transformers' text config
    patch: int  # numbers of an image's patch


def build_stack_for(config: RunConfig, spec: DiffusionGemmaConfig) -> DiffusionGemmaStack:
    """The stack as training would have it, frozen and adapted, at expert parallel 1 and with meta parameters.

    Raises:
        UserError: patterns of `model.freeze` or `lora` that do not fit the model.
    """
    trains = config.model.train_vision_embedding
    stack = build_stack(spec, train_router=config.model.train_router, train_vision_embedding=trains)
    place_experts(stack, size=1, rank=0, grouped=False)
    freeze(stack, config.model.freeze)
    if config.lora is not None:
        adapters = choose_adapters(stack, config.lora, grouped_matmul=config.parallel.grouped_matmul != "off")
        adapt_linears(stack, adapters.targets, config.lora)
        adapt_experts(stack, adapters.targets, config.lora)
    return stack


def take_inventory(stack: DiffusionGemmaStack) -> Inventory:
    """Count every parameter of a stack that was built at expert parallel 1."""
    vision: Any = stack.config.vision_config
    parameters = [
        Parameter(name, unit_of(name), tuple(p.shape), p.numel(), is_expert_parameter(p), p.requires_grad)
        for name, p in stack.named_parameters()
    ]
    trained = [parameter for parameter in parameters if parameter.is_trained]
    return Inventory(
        parameters=parameters,
        trained=trained,
        count=sum(parameter.numel for parameter in parameters),
        trained_count=sum(parameter.numel for parameter in trained),
        outside=sum(map(prod, stack.outside.values())),
        products=products_of(stack),
        text=text_spec(stack.config),
        patch=3 * vision.patch_size**2,
    )
