"""Who gets an adapter, and what a new one starts from."""

import pytest
import torch

from ds_dgemma.config import LoraSection
from ds_dgemma.errors import UserError
from ds_dgemma.model.build import build_stack
from ds_dgemma.model.lora import Adapter, FreshAdapters, Target, choose_targets, seed_dropout
from ds_dgemma.model.stack import DiffusionGemmaStack
from tests.reference.fixtures import Case, make_config

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


@pytest.fixture(scope="module")
def stack() -> DiffusionGemmaStack:
    """Two layers, sliding and full; the full one has no v_proj."""
    return build_stack(make_config(Case()))


def chosen(stack: DiffusionGemmaStack, **settings) -> set[str]:
    return {target.name for target in choose_targets(stack, LoraSection(**settings))}


def test_attention_and_dense_mlp_get_one_by_default(stack):
    mlp = {f"layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("gate", "up", "down")}
    attention = {f"layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qkvo"} - {"layers.1.self_attn.v_proj"}
    assert chosen(stack) == mlp | attention


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"target_modules": ["q_proj"]}, {"layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"}),
        ({"target_modules": ["1.self_attn.q_proj"]}, {"layers.1.self_attn.q_proj"}),
        ({"target_modules": r".*decoder\.layers\.0\..*\.[kq]_proj"}, {f"layers.0.self_attn.{n}_proj" for n in "kq"}),
        ({"target_modules": r"model\.encoder\.language_model\.layers\.1\.router\.proj"}, {"layers.1.router.proj"}),
        ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj", "0.self_attn.q_proj"]}, None),
        (
            {"target_modules": None, "target_parameters": ["experts.down_proj"]},
            {f"layers.{i}.experts.down_proj" for i in (0, 1)},
        ),
        (
            {"target_modules": None, "target_parameters": ["layers.0.experts.gate_up_proj"]},
            {"layers.0.experts.gate_up_proj"},
        ),
    ],
)
def test_patterns_mean_what_they_mean_to_peft(stack, settings, names):
    assert chosen(stack, **settings) == (names or {"layers.1.self_attn.q_proj"})


def test_all_linear_is_every_linear_of_the_language_model_and_no_expert(stack):
    names = chosen(stack, target_modules="all-linear")
    assert {"self_conditioning.gate_proj", "layers.0.router.proj"} < names
    assert not any("experts" in name for name in names)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"target_modules": ["q_prj"]},
            r"lora.target_modules  'q_prj' matches no linear .*Did you mean q_proj\?",
        ),
        ({"target_modules": ["experts.down_proj"]}, r"It belongs in lora.target_parameters"),
        (
            {"target_parameters": ["mlp.up_proj"]},
            r"It belongs in lora.target_modules",
        ),
        (
            {"target_parameters": ["experts.gate_proj"]},
            r"no tensor of the experts .* mean experts.gate_up_proj\?",
        ),
        ({"exclude_modules": ["vision"]}, r"lora.exclude_modules  'vision' matches no linear"),
        ({"target_modules": ["q_proj"], "exclude_modules": "model.*"}, r"nothing would be trained"),
    ],
)
def test_a_pattern_that_picks_nothing_is_told(stack, settings, said):
    with pytest.raises(UserError, match=said):
        choose_targets(stack, LoraSection(**settings))


def test_new_factors_depend_on_seed_name_and_expert_but_not_on_who_asks():
    target = Target("layers.0.experts.down_proj", inputs=5, outputs=7, experts=4)
    fresh = FreshAdapters([target], LoraSection(r=3), seed=1)
    name, size = f"{target.name}.lora_A", 4 * 3 * 5
    whole = fresh.values(name, 0, size)
    for start, stop in ((0, 15), (7, 8), (14, 46), (59, 60), (60, 60)):
        assert torch.equal(fresh.values(name, start, stop), whole[start:stop])
    experts = whole.view(4, -1)
    assert len({tuple(expert.tolist()) for expert in experts}) == 4
    assert whole.abs().max() <= 5**-0.5
    assert whole.std() == pytest.approx((5**-0.5) / 3**0.5, rel=0.2)
    assert not fresh.values(f"{target.name}.lora_B", 0, 4 * 7 * 3).any()
    assert not torch.equal(FreshAdapters([target], LoraSection(r=3), seed=2).values(name, 0, size), whole)


def test_gaussian_and_random_starts_are_peft_s():
    target = Target("layers.0.mlp.up_proj", inputs=400, outputs=300)
    gaussian = FreshAdapters([target], LoraSection(r=8, init_lora_weights="gaussian"), seed=0)
    assert gaussian.values(f"{target.name}.lora_A", 0, 3200).std() == pytest.approx(1 / 8, rel=0.1)
    both = FreshAdapters([target], LoraSection(r=8, init_lora_weights=False), seed=0)
    assert both.values(f"{target.name}.lora_B", 0, 2400).abs().max() == pytest.approx(8**-0.5, rel=0.01)


def test_dropout_is_for_gradients_only_and_keyed_by_the_step():
    adapter = Adapter(Target("layers.0.mlp.up_proj", 64, 8), LoraSection(r=4, lora_dropout=0.5)).train()
    torch.nn.init.normal_(adapter.lora_A)
    torch.nn.init.normal_(adapter.lora_B)
    inputs = torch.randn(3, 64)

    def outputs(step: int) -> torch.Tensor:
        seed_dropout(0, step, rank=1)
        return adapter(inputs)

    with torch.no_grad():
        whole = outputs(1)
    torch.testing.assert_close(whole, inputs @ adapter.lora_A.t() @ adapter.lora_B.t() * 2)
    assert torch.equal(outputs(1), outputs(1))
    assert not torch.allclose(outputs(1), outputs(2))
    assert not torch.allclose(outputs(1), whole)
    assert torch.equal(adapter.eval()(inputs), whole)
