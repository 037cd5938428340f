"""What is frozen and in which group a parameter is, told by the checkpoint's names."""

import pytest

from ds_dgemma.config.optimizer import OptimizerSection, ParameterGroupSection
from ds_dgemma.engine.expert_parallel import place_experts
from ds_dgemma.engine.optimizers import parameter_groups
from ds_dgemma.errors import UserError
from ds_dgemma.model.build import build_stack
from ds_dgemma.model.names import checkpoint_name
from ds_dgemma.model.stack import DiffusionGemmaStack
from ds_dgemma.model.trainable import all_names, check_groups, check_stage, freeze, trained_names
from tests.reference.fixtures import Case, make_config


@pytest.fixture
def stack() -> DiffusionGemmaStack:
    """Two layers on DeepSpeed's experts, whose tensors are apart where the checkpoint's are not."""
    stack = build_stack(make_config(Case()), train_router=True)
    place_experts(stack, size=1, rank=0, grouped=False)
    return stack


def trained(stack: DiffusionGemmaStack) -> set[str]:
    return set(trained_names(stack))


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        (["*.experts.gate_up_proj"], lambda n: n.endswith("gate_up_proj")),
        (["model.decoder.layers.0.*", "*embed_tokens*"], lambda n: ".layers.0." in n or "embed_tokens" in n),
        ([r"re:.*\.(mlp|self_attn)\..*"], lambda n: ".mlp." in n or ".self_attn." in n),
        (["model.encoder.vision_tower.*", "model.encoder.language_model.layers.0.layer_scalar"], lambda n: False),
        (["model.encoder.language_model.layers.1.*", "lm_head.*"], lambda n: ".layers.1." in n or "embed_tokens" in n),
    ],
)
def test_a_pattern_freezes_what_it_covers_and_nothing_else(stack, patterns, frozen):
    before = trained(stack)
    freeze(stack, patterns)
    assert before - trained(stack) == {name for name in before if frozen(name)}


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (["*.expert.*"], r"model.freeze  '\*.expert.\*' matches no name of the checkpoint"),
        (["model.decoder.embed_token.weight"], r"Did you mean model.decoder.embed_tokens.weight\?"),
        (["*"], "freezes every parameter"),
    ],
)
def test_a_pattern_that_freezes_nothing_or_everything_is_told(stack, patterns, said):
    with pytest.raises(UserError, match=said):
        freeze(stack, patterns)


def optimizer(*groups: tuple) -> OptimizerSection:
    sections = [ParameterGroupSection(match=match, lr=lr, weight_decay=decay) for match, lr, decay in groups]
    return OptimizerSection(lr=1e-3, groups=tuple(sections))


def test_the_first_group_that_matches_has_a_parameter_and_the_rest_is_one_group(stack):
    stack.layers[0].requires_grad_(False)
    chosen = optimizer(("*.experts.down_proj", 5e-4, 0.1), ("*.experts.*", None, 0.0), ("*.norm.weight", 2e-3, None))
    groups = {group["name"]: group for group in parameter_groups(stack, chosen)}
    names = {id(parameter): checkpoint_name(name) for name, parameter in stack.named_parameters()}
    held = {name: [names[id(parameter)] for parameter in group["params"]] for name, group in groups.items()}
    assert held["group-0"] == ["model.decoder.layers.1.experts.down_proj"]
    assert held["group-1"] == ["model.decoder.layers.1.experts.gate_up_proj"] * 2
    assert held["group-2"] == ["model.decoder.norm.weight"]
    assert {name for part in held.values() for name in part} == trained(stack)
    settings = {name: (group["lr_scale"], group.get("weight_decay")) for name, group in groups.items()}
    assert settings == {"group-0": (0.5, 0.1), "group-1": (1, 0), "group-2": (2, None), "rest": (1, None)}


@pytest.mark.parametrize(
    ("match", "said"),
    [
        ("*.expert.*", r"optimizer.groups.1.match  '\*.expert.\*' matches no name"),
        ("*.layers.1.experts.down_proj", r"optimizer.groups.1.match .*only what groups before it took"),
        ("*.layers.0.mlp.*", r"optimizer.groups.1.match .*matches only what is not trained"),
        ("*.vision_tower.*", r"optimizer.groups.1.match .*matches only what is not trained"),
    ],
)
def test_a_group_that_gets_nothing_is_told(stack, match, said):
    names = all_names(stack)
    freeze(stack, ["*.layers.0.mlp.*"])
    with pytest.raises(UserError, match=said):
        check_groups(optimizer(("*.experts.*", 1e-4, None), (match, 1e-4, None)), trained_names(stack), names)


def test_frozen_experts_need_stage_3(stack):
    check_stage(1, sorted(trained(stack)))
    freeze(stack, ["*.experts.*"])
    check_stage(3, sorted(trained(stack)))
    with pytest.raises(UserError, match="stage = 2: all experts are frozen"):
        check_stage(2, sorted(trained(stack)))
