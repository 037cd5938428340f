"""Who gets an adapter, and what a new one starts from."""

import pytest
import torch

from ds_dgemma.config.run import LoraSection
from ds_dgemma.errors import UserError
from ds_dgemma.model.build import build_stack
from ds_dgemma.model.dropout import PartDropout
from ds_dgemma.model.lora import FreshAdapters, LoraLinear, Target, choose_targets, seed_dropout
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


def test_dropout_falls_alike_on_a_part_whatever_stands_beside_it():
    dropout, target = PartDropout(), Target("layers.0.mlp.up_proj", 64, 8)
    linear = LoraLinear(torch.nn.Linear(64, 8, bias=False), target, LoraSection(r=4, lora_dropout=0.5), dropout)
    torch.nn.init.normal_(linear.lora_A)
    torch.nn.init.normal_(linear.lora_B)
    clean, guess, canvas = (torch.randn(tokens, 64) for tokens in (5, 2, 3))

    def outputs(*parts: tuple[torch.Tensor, int | None]) -> torch.Tensor:
        with dropout.of(tuple((len(part), seed) for part, seed in parts)), torch.no_grad():
            return linear(torch.cat([part for part, _ in parts])[None])[0]

    whole = linear.eval()(torch.cat([clean, guess, canvas]))
    linear.train()
    read, denoised = outputs((clean, 7), (guess, None)), outputs((canvas, 8))
    torch.testing.assert_close(outputs((clean, 7), (canvas, 8)), torch.cat([read[:5], denoised]))
    torch.testing.assert_close(read[5:], whole[5:7])  # self-conditioning guesses with the whole adapter
    assert not torch.allclose(read[:5], whole[:5])
    assert not torch.allclose(read[:5], outputs((clean, 9)))
    masks = [dropout_mask(64, key) for key in (linear._key, linear._key + 1)]
    assert not torch.equal(*masks)  # every adapter drops others


def dropout_mask(features: int, key: int) -> torch.Tensor:
    dropout = PartDropout()
    with dropout.of(((1, 3),)):
        return dropout(torch.ones(1, features), 0.5, key)


def test_a_steps_draws_depend_on_seed_step_and_rank_alone():
    drawn = []
    for key in ((0, 1, 0), (0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)):
        seed_dropout(*key)
        drawn.append(int(torch.randint(2**62, ())))
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 4
