"""Adapters of a run: chosen before anything is loaded, put onto the loaded model, this rank's part of them filled.

Those of the experts lie beside DeepSpeed's layer (`experts.py`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch

from ds_dgemma.checkpoint.adapter import AdapterReader, AdapterValues, fill_adapters
from ds_dgemma.checkpoint.load import MakeReal
from ds_dgemma.checkpoint.run_state import StateReader
from ds_dgemma.config.run import LoraSection
from ds_dgemma.engine.experts import Experts
from ds_dgemma.errors import UserError
from ds_dgemma.model.lora import (
    FACTORS,
    FreshAdapters,
    Target,
    adapt_linears,
    check_continues,
    choose_targets,
    possible_targets,
)
from ds_dgemma.model.names import DECODER, adapter_state_name
from ds_dgemma.model.stack import DiffusionGemmaStack

GROUPED_RANK = 8  # grouped products want the rows of a bf16 matrix to start at multiples of 16 bytes


@dataclass(frozen=True)
class Adapters:
    """What a run will adapt, and what it continues from."""

    lora: LoraSection
    targets: tuple[Target, ...]
    continued: AdapterReader | None

    def base_warning(self, model: str) -> str | None:
        """A word on a `lora.path` that was made for a model of another name."""
        return self.continued.base_warning(model) if self.continued else None

    def names(self) -> list[str]:
        """The names of the factors, beside the checkpoint's."""
        return [f"{DECODER}{target.name}.{factor}" for target in self.targets for factor in FACTORS]

    def sizes(self) -> dict[str, int]:
        """Elements of every factor, all experts in front, by its name in the training state."""
        return {
            adapter_state_name(f"{target.name}.{factor}"): prod(target.shape(factor, self.lora.r))
            for target in self.targets
            for factor in FACTORS
        }


def choose_adapters(stack: DiffusionGemmaStack, lora: LoraSection, grouped_matmul: bool) -> Adapters:
    """Freeze the base and say what gets an adapter; no weights read.

    Raises:
        UserError: a pattern that matches nothing, a rank that the kernel refuses, or another adapter in `lora.path`.
    """
    stack.requires_grad_(False)
    targets = choose_targets(stack, lora)
    if grouped_matmul and lora.r % GROUPED_RANK and any(target.experts for target in targets):
        raise UserError(
            f"lora.r = {lora.r} is not a multiple of {GROUPED_RANK}, which the experts' grouped matrix multiplication "
            f"needs. Set lora.r: {-(-lora.r // GROUPED_RANK) * GROUPED_RANK}, or parallel.grouped_matmul: off."
        )
    if lora.path is None:
        return Adapters(lora, targets, None)
    continued = AdapterReader(lora.path, possible_targets(stack))
    check_continues(lora, targets, continued.lora, continued.targets)
    return Adapters(lora, targets, continued)


def attach_adapters(
    stack: DiffusionGemmaStack,
    adapters: Adapters,
    make_real: MakeReal,
    *,
    expert_rank: int = 0,
    trained: StateReader | None = None,
    seed: int = 0,
) -> None:
    """Put the adapters onto a loaded stack: as a resumed run `trained` them, as they were continued, or drawn anew."""
    adapt_linears(stack, adapters.targets, adapters.lora)
    adapt_experts(stack, adapters.targets, adapters.lora)
    values: AdapterValues
    if trained is not None:
        values = lambda name, start, stop: trained.read(adapter_state_name(name), "fp32", start, stop)  # noqa: E731
    elif adapters.continued is not None:
        values = adapters.continued.values
    else:
        values = FreshAdapters(adapters.targets, adapters.lora, seed).values
    fill_adapters(stack, make_real, values, expert_rank=expert_rank)


def adapt_experts(stack: DiffusionGemmaStack, targets: Iterable[Target], lora: LoraSection) -> None:
    """Put adapters, on meta, beside the experts of every layer that has a targeted tensor."""
    by_layer: dict[str, list[Target]] = {}
    for target in targets:
        if target.experts:
            by_layer.setdefault(target.name.rpartition(".")[0], []).append(target)
    for name, chosen in by_layer.items():
        layer = stack.get_submodule(name)  # AutoEP's: the experts are below it
        assert isinstance(layer.experts, Experts)
        with torch.device("meta"):
            for target in chosen:
                layer.experts.adapt(target, lora)
