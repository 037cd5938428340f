"""Adapted experts compute with W + scaling * B A, by loop and by grouped product; a rank that cannot is told early."""

import pytest
import torch
import torch.nn.functional as F
from deepspeed.moe.ep_experts import GroupedExperts
from torch import Tensor

from ds_dgemma.config.run import LoraSection
from ds_dgemma.engine.adapters import choose_adapters
from ds_dgemma.engine.experts import Experts
from ds_dgemma.engine.private import EXPERT_TAGS as TAGS
from ds_dgemma.errors import UserError
from ds_dgemma.model.build import build_stack
from ds_dgemma.model.lora import Target
from tests.reference.fixtures import Case, make_config

EXPERTS, HIDDEN, INNER, RANK = 4, 16, 24, 8
COUNTS, PADDING = (8, 0, 16, 8), 8
TARGETS = {
    "gate_up_proj": Target("layers.0.experts.gate_up_proj", HIDDEN, 2 * INNER, EXPERTS),
    "down_proj": Target("layers.0.experts.down_proj", INNER, HIDDEN, EXPERTS),
}


def adapted(names: list[str], grouped: bool) -> Experts:
    """Random weights and factors."""
    base = GroupedExperts(HIDDEN, INNER, EXPERTS, use_grouped_mm=grouped, activation="geglu_tanh")
    for weight in base.parameters():
        for tag in TAGS:
            setattr(weight, tag, f"of {tag}")
    experts = Experts(base)
    for name in names:
        experts.adapt(TARGETS[name], LoraSection(r=RANK, lora_alpha=12))
    draw = torch.Generator().manual_seed(0)
    for name, parameter in experts.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) / parameter.shape[-1] ** 0.5
        parameter.requires_grad_("lora" in name)
    return experts


def merged(experts: Experts, rows: Tensor) -> Tensor:
    """The slow and obvious way, expert by expert."""
    outputs = []
    for e, part in enumerate(rows[: sum(COUNTS)].split(COUNTS)):
        gate_up, down = torch.cat([experts.w1[e], experts.w3[e]]), experts.w2[e]
        if (pair := experts.gate_up_proj) is not None:
            gate_up = gate_up + 1.5 * pair.lora_B[e] @ pair.lora_A[e]
        if (pair := experts.down_proj) is not None:
            down = down + 1.5 * pair.lora_B[e] @ pair.lora_A[e]
        gate, up = (part @ gate_up.t()).chunk(2, dim=-1)
        outputs.append((F.gelu(gate, approximate="tanh") * up) @ down.t())
    return torch.cat(outputs)


@pytest.mark.parametrize("grouped", [False, True], ids=["loop", "grouped"])
@pytest.mark.parametrize("names", [["gate_up_proj", "down_proj"], ["gate_up_proj"], ["down_proj"]], ids="+".join)
def test_outputs_and_gradients_are_those_of_merged_weights(names: list[str], grouped: bool):
    experts = adapted(names, grouped)
    draw = torch.Generator().manual_seed(1)
    rows = torch.randn(sum(COUNTS) + PADDING, HIDDEN, generator=draw)
    wanted = torch.randn(sum(COUNTS), HIDDEN, generator=draw)
    seen = []
    for compute in (
        lambda x: experts(x, torch.tensor(COUNTS, dtype=torch.int32))[: sum(COUNTS)],
        lambda x: merged(experts, x),
    ):
        inputs = rows.clone().requires_grad_()
        output = compute(inputs)
        gradients = torch.autograd.grad(
            (output * wanted).sum(), [inputs, *(p for p in experts.parameters() if p.requires_grad)]
        )
        seen.append([output, gradients[0][: sum(COUNTS)], *gradients[1:]])
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-5)
    assert len(seen[0]) == 2 + 2 * len(names)


def test_factors_are_tagged_as_the_weights_are_so_that_zero_shares_them_as_it_shares_those():
    for name, parameter in adapted(["gate_up_proj", "down_proj"], grouped=False).named_parameters():
        assert [getattr(parameter, tag) for tag in TAGS] == [f"of {tag}" for tag in TAGS], name


def test_a_rank_that_grouped_products_refuse_is_told_early():
    stack = build_stack(make_config(Case()))
    lora = LoraSection(r=12, target_parameters=("experts.down_proj",))
    assert choose_adapters(stack, lora, grouped_matmul=False).targets
    with pytest.raises(UserError, match=r"lora.r = 12 is not a multiple of 8.*Set lora.r: 16"):
        choose_adapters(stack, lora, grouped_matmul=True)
    assert choose_adapters(stack, LoraSection(r=12), grouped_matmul=True).targets
