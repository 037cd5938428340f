"""DiffusionGemma's experts on DeepSpeed's expert-parallel layer (AutoEP).

The model's own router decides; a slot hands its result to AutoEP, which sends tokens to the ranks that hold their
experts and back. `per_expert_scale` stays in the routing weights, so it is exact, and no token is ever dropped.
DeepSpeed has no preset for DiffusionGemma, so the layer is placed here, before `deepspeed.initialize`, and the
DeepSpeed JSON has no `expert_parallel` block.

Shapes: N tokens, H hidden, k experts per token, E experts. Source: deepspeed 0.19.8 `module_inject/auto_ep_layer.py`.
"""

import torch
from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer, RouterOutput
from deepspeed.moe.ep_count import count_tokens_per_expert
from torch import Tensor, nn
from transformers import DiffusionGemmaConfig

from ds_dgemma.model.spec import text_spec
from ds_dgemma.model.stack import DiffusionGemmaStack


class RoutingSlot(nn.Module):
    """Stands where AutoEP has a router, and returns the decision that the model's own router made."""

    def __init__(self) -> None:
        super().__init__()
        self.decision: RouterOutput | None = None

    def forward(self, hidden_NH: Tensor, expert_bias: Tensor | None = None) -> RouterOutput:
        assert self.decision is not None
        return self.decision


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
        self.router = RoutingSlot()
        self.tokens_per_expert = torch.zeros(text.num_experts)

    def forward(self, hidden_NH: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:  # type: ignore[override]
        """Return the weighted sum of each token's experts, [N, H]; index and weights are [N, k]."""
        counts = count_tokens_per_expert(top_k_index, self.num_experts)
        self.router.decision = RouterOutput(top_k_weights, top_k_index, counts)
        try:
            mixed = super().forward(hidden_NH.unsqueeze(0))
            assert isinstance(mixed, Tensor)  # router logits were not asked for
            return mixed.squeeze(0)
        finally:
            self.router.decision = None  # or the routing weights' graph would outlive the step


def place_experts(stack: DiffusionGemmaStack, size: int, rank: int, grouped: bool) -> None:
    """Replace every layer's experts, still on meta, by this rank's share of them."""
    with torch.device("meta"):
        for layer in stack.sweep_layers():
            layer.experts = ExpertParallelExperts(layer.experts, stack.config, size, rank, grouped)
    for layer in stack.sweep_layers():
        layer.experts.tokens_per_expert = torch.zeros(text_spec(stack.config).num_experts)
