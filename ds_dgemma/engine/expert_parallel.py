"""DiffusionGemma's experts on DeepSpeed's expert-parallel layer (AutoEP).

The model's own router decides; tokens are sent to the ranks that hold their experts and back, by AutoEP's split plan
and all-to-all. `per_expert_scale` stays in the routing weights, so it is exact, and no token is ever dropped.
DeepSpeed has no preset for DiffusionGemma, so the layer is placed here, before `deepspeed.initialize`, and the
DeepSpeed JSON has no `expert_parallel` block.

Shapes: N tokens, H hidden, k experts per token, E experts, R = N * k rows.
Source: deepspeed 0.19.8 `module_inject/auto_ep_layer.py`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
from deepspeed.module_inject.auto_ep_layer import (
    AutoEPMoELayer,
    compute_split_plan,
    permute_by_local_expert,
    unpermute_by_local_expert,
)
from deepspeed.moe.ep_count import count_tokens_per_expert
from torch import Tensor, nn
from transformers import DiffusionGemmaConfig

from ds_dgemma.engine.experts import Experts
from ds_dgemma.engine.private import AllToAll
from ds_dgemma.model.spec import text_spec
from ds_dgemma.model.stack import DiffusionGemmaStack


class ExpertParallelExperts(AutoEPMoELayer):
    """AutoEP behind transformers' call `experts(hidden, top_k_index, top_k_weights)`."""

    def __init__(self, experts: nn.Module, config: DiffusionGemmaConfig, size: int, rank: int, grouped: bool) -> None:
        text = text_spec(config)
        spec = MoELayerSpec(
            moe_module_name="experts",
            model_family="diffusion_gemma",
            router_name="gate",
            experts_name="experts",
            expert_storage="fused_3d",
            expert_w1_name="gate_up_proj",
            expert_w2_name="down_proj",
            expert_w3_name=None,
            num_experts=text.num_experts,
            top_k=text.top_k_experts,
            hidden_size=text.hidden_size,
            ffn_hidden_size=text.moe_intermediate_size,
            score_func="softmax",
            score_apply="post",
            route_norm=True,
            gate_bias=False,
            return_router_logits=False,
            router_logits_capture_target="none",
            router_logits_capture_index=None,
            router_logits_capture_layer_name=None,
            has_shared_experts=False,
            shared_experts_name="",
            expert_activation="geglu_tanh",
        )
        source = nn.Module()
        source.gate = nn.Linear(text.hidden_size, text.num_experts, bias=False, device="meta")
        source.experts = experts
        super().__init__(spec, source, size, rank, AutoEPConfig(enabled=True, autoep_size=size, use_grouped_mm=grouped))
        self.router = nn.Module()  # the model's own decides
        self.experts = Experts(self.experts)

    def forward(self, hidden_NH: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:  # type: ignore[override]
        """Return the weighted sum of each token's experts, [N, H]; index and weights are [N, k]."""
        order_R = torch.argsort(top_k_index.flatten(), stable=True)
        place_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
        counts = count_tokens_per_expert(top_k_index, self.num_experts)
        rows = _Dispatch.apply(hidden_NH, order_R, place_R, self.top_k)
        if self.ep_size == 1:
            rows = self._compute(rows, counts)
        else:
            plan = compute_split_plan(
                top_k_index, self.num_experts, self.ep_size, self.num_local_experts, self.ep_group, counts
            )
            rows = AllToAll.apply(self.ep_group, rows, plan.input_splits, plan.output_splits)
            rows = self._compute(rows, plan.local_counts_by_source)
            rows = AllToAll.apply(self.ep_group, rows, plan.output_splits, plan.input_splits)
        return _Combine.apply(rows, top_k_weights, order_R, place_R)

    def _compute(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows [R, H] through this rank's experts; `counts` of each expert, or of each source and expert."""
        if counts.ndim == 1 and not self.experts.use_grouped_mm:
            return self.experts(rows, counts)  # sorted, and a loop needs no padding
        sorted_rows, places, aligned, count = permute_by_local_expert(rows, counts)
        return unpermute_by_local_expert(self.experts(sorted_rows, aligned), places, count)


class _Dispatch(torch.autograd.Function):
    """Each token's row once for every expert that it chose, sorted by expert.

    Backward a token's rows are gathered and summed. torch's own backward of the gather, which AutoEP's layer has, adds
    rows into repeated places: atomics, or a sort, and in bf16 a rounding each.
    """

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, order_R: Tensor, place_R: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(place_R)
        ctx.top_k = top_k
        return hidden_NH.index_select(0, order_R // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (place_R,) = ctx.saved_tensors
        return F.embedding_bag(place_R.unflatten(0, (-1, ctx.top_k)), grads[0], mode="sum"), None, None, None


class _Combine(torch.autograd.Function):
    """Each token's weighted sum of its experts' rows, in fp32 at least; gathers in both directions."""

    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, weight_Nk: Tensor, order_R: Tensor, place_R: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RH, weight_Nk, order_R, place_R)
        if weight_Nk.dtype == rows_RH.dtype:  # without a copy of the rows in between
            return F.embedding_bag(place_R.view_as(weight_Nk), rows_RH, mode="sum", per_sample_weights=weight_Nk)
        rows = rows_RH.index_select(0, place_R).unflatten(0, weight_Nk.shape)
        return torch.bmm(weight_Nk.unsqueeze(1), rows.to(weight_Nk.dtype)).squeeze(1).to(rows_RH.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        rows_RH, weight_Nk, order_R, place_R = ctx.saved_tensors
        d_rows, d_weight = grads[0].index_select(0, order_R // weight_Nk.shape[1]), None
        if ctx.needs_input_grad[1]:
            d_weight_R = torch.linalg.vecdot(rows_RH.to(weight_Nk.dtype), d_rows.to(weight_Nk.dtype))
            d_weight = d_weight_R.index_select(0, place_R).view_as(weight_Nk)
        d_rows.mul_(weight_Nk.flatten().index_select(0, order_R).unsqueeze(-1))
        return d_rows, d_weight, None, None


def place_experts(stack: DiffusionGemmaStack, size: int, rank: int, grouped: bool) -> None:
    """Replace every layer's experts, still on meta, by this rank's share of them."""
    with torch.device("meta"):
        for layer in stack.sweep_layers():
            layer.experts = ExpertParallelExperts(layer.experts, stack.config, size, rank, grouped)
    for layer in stack.sweep_layers():
        layer.experts.tokens_per_expert = torch.zeros(text_spec(stack.config).num_experts)
