"""Adapters of a run: chosen before anything is loaded, put onto the loaded model, this rank's part of them filled.

Experts have theirs here, beside DeepSpeed's layer. W + B A is never made: a row of tokens is multiplied with its
expert's W, and with its A and then its B, by the same kernel (a loop, torch's grouped product, or Triton's). The
factors are tagged as AutoEP tags W, so that ZeRO shares them among the ranks that hold the same experts and reduces
their gradients there; untagged they would be averaged over ranks that hold different experts.

Shapes: N rows sorted by expert, e experts of this rank, H hidden, F intermediate. Source: deepspeed 0.19.8
`moe/ep_experts.py`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from deepspeed.moe.ep_experts import GroupedExperts, apply_expert_activation
from torch import Tensor

from ds_dgemma.checkpoint.adapter import AdapterReader, AdapterValues, check_continues, fill_adapters
from ds_dgemma.checkpoint.load import MakeReal
from ds_dgemma.checkpoint.names import DECODER, adapter_state_name
from ds_dgemma.checkpoint.run_state import StateReader
from ds_dgemma.config import LoraSection
from ds_dgemma.errors import UserError
from ds_dgemma.model.lora import (
    FACTORS,
    Adapter,
    FreshAdapters,
    Target,
    adapt_linears,
    choose_targets,
    possible_targets,
)
from ds_dgemma.model.stack import DiffusionGemmaStack

GROUPED_RANK = 8  # grouped products want the rows of a bf16 matrix to start at multiples of 16 bytes

# AutoEP's marks of one rank's part of the experts.
TAGS = ("allreduce", "group_name", "ds_zero_placement_family", "ds_zero_partition_group_name", "is_expert_group")


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
    check_continues(continued, targets, lora)
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


class AdaptedExperts(GroupedExperts):
    """Frozen experts under their names (w1 gate, w3 up, w2 down), with an adapter for gate and up, down, or both."""

    def __init__(self, base: GroupedExperts, targets: Iterable[Target], lora: LoraSection) -> None:
        experts, inner, hidden = getattr(base.w1, "ds_shape", base.w1.shape)  # ZeRO-3's shards have no shape
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
        for target in targets:
            adapter = Adapter(target, lora, experts)
            for factor in adapter.parameters():
                for tag in TAGS:
                    setattr(factor, tag, getattr(base.w1, tag))
            setattr(self, target.name.rpartition(".")[2], adapter)

    def forward(self, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        """Rows [N, H] to rows [N, H]; rows behind the last expert's are padding."""
        product = self._product(num_tokens_per_expert)
        gate, up = product(x, self.w1), product(x, self.w3)
        if self.gate_up_proj is not None:
            for_gate, for_up = self.gate_up_proj(x, product).chunk(2, dim=-1)
            gate, up = gate + for_gate, up + for_up
        settings = (self.activation, self.activation_alpha, self.activation_limit)
        inner = apply_expert_activation(gate, up, *settings, fused=x.is_cuda and self.use_grouped_mm)
        output = product(inner, self.w2)
        return output if self.down_proj is None else output + self.down_proj(inner, product)

    def _product(self, counts: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """How each expert's rows are multiplied with its own weight [out, in] of [e, out, in]."""
        if not self.use_grouped_mm:
            return partial(_loop, counts=counts.tolist())
        offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
        return partial(_triton if self.use_triton_grouped_mm else _grouped, offsets=offsets)


def _loop(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    padding = len(rows) - sum(counts)
    *parts, rest = rows.split([*counts, padding])
    products = [part @ matrix.t() for part, matrix in zip(parts, weight.to(rows.dtype), strict=True)]
    return torch.cat([*products, rest.new_zeros(padding, weight.shape[1])])


def _grouped(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return torch._grouped_mm(rows, weight.to(rows.dtype).transpose(-2, -1), offs=offsets)


def _triton(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    from deepspeed.ops.triton_ops.group_gemm_triton import group_gemm_triton  # needs Triton, so a GPU

    return group_gemm_triton(rows, weight.to(rows.dtype), offsets, trans_b=True)


def adapt_experts(stack: DiffusionGemmaStack, targets: Iterable[Target], lora: LoraSection) -> None:
    """Put adapters, on meta, beside the experts of every layer that has a targeted tensor."""
    by_layer: dict[str, list[Target]] = {}
    for target in targets:
        if target.experts:
            by_layer.setdefault(target.name.rpartition(".")[0], []).append(target)
    for name, chosen in by_layer.items():
        layer = stack.get_submodule(name)  # AutoEP's: the experts are below it
        assert isinstance(layer.experts, GroupedExperts)
        with torch.device("meta"):
            layer.experts = AdaptedExperts(layer.experts, chosen, lora)
