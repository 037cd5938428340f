"""Which parameters are trained; people name them as in the checkpoint."""

from collections.abc import Iterable, Sequence

from torch import nn

from ds_dgemma.config.optimizer import OptimizerSection
from ds_dgemma.config.run import RunConfig
from ds_dgemma.errors import UserError, did_you_mean, one_line_each
from ds_dgemma.model.names import checkpoint_name, matching, places_of
from ds_dgemma.model.stack import DiffusionGemmaStack


def freeze(stack: DiffusionGemmaStack, patterns: Sequence[str]) -> None:
    """Stop training what the patterns name; they may name what is frozen anyway.

    Raises:
        UserError: a pattern that matches nothing, or nothing is left to train.
    """
    parameters: dict[str, list[nn.Parameter]] = {}
    for name, parameter in stack.named_parameters():
        parameters.setdefault(checkpoint_name(name), []).append(parameter)
    names = all_names(stack)
    problems = [_no_match("model.freeze", pattern, names) for pattern in patterns if not matching(pattern, names)]
    for name in (name for pattern in patterns for name in matching(pattern, parameters)):
        for parameter in parameters[name]:
            parameter.requires_grad_(False)
    if not problems and not any(parameter.requires_grad for parameter in stack.parameters()):
        problems.append("model.freeze  freezes every parameter: nothing would be trained.")
    if problems:
        raise one_line_each("the run config", problems)


def all_names(stack: DiffusionGemmaStack) -> list[str]:
    """The names of all that the checkpoint holds, scalars and vision tower too."""
    return sorted({*(place.tensor for place in places_of(stack).values()), *stack.outside})


def trained_names(module: nn.Module) -> list[str]:
    """The names, as in the checkpoint, of what is not frozen."""
    return sorted({checkpoint_name(name) for name, p in module.named_parameters() if p.requires_grad})


def check_trained(config: RunConfig, stage: int, trained: Sequence[str], tensors: Iterable[str]) -> None:
    """Raise `UserError` where what is `trained` does not go with config or stage; `tensors`: all of the checkpoint."""
    check_stage(stage, trained)
    check_groups(config.optimizer, trained, tensors)
    check_router_balance(config.objective.router_balance_weight, trained)


def check_stage(stage: int, trained: Sequence[str]) -> None:
    """Raise `UserError` where DeepSpeed's ZeRO stages 1 and 2 would stop: they want a group of expert parameters."""
    if stage < 3 and not any(".experts." in name for name in trained):
        raise UserError(
            f"zero_optimization.stage = {stage}: all experts are frozen, which DeepSpeed does at stage 3 only. Use "
            "stage 3 (ds_configs/zero3.json), or train them: with lora, by lora.target_parameters."
        )


def check_groups(optimizer: OptimizerSection, trained: Sequence[str], tensors: Iterable[str]) -> None:
    """Raise `UserError` for a group that gets none of the parameters `trained`; `tensors` are all of the checkpoint."""
    problems, left = [], list(trained)
    for number, group in enumerate(optimizer.groups):
        picked = matching(group.match, left)
        if not picked:
            problem = _no_match(f"optimizer.groups.{number}.match", group.match, trained)
            if matching(group.match, trained):
                problem = (
                    f"optimizer.groups.{number}.match  {group.match!r} matches only what groups before it took. "
                    "The first match wins: put the special ones first."
                )
            elif matching(group.match, tensors):
                problem = (
                    f"optimizer.groups.{number}.match  {group.match!r} matches only what is not trained: frozen by "
                    "model.freeze or lora, routers without model.train_router, the vision tower. Train it, or remove "
                    "the group."
                )
            problems.append(problem)
        left = [name for name in left if name not in picked]
    if problems:
        raise one_line_each("the run config", problems)


def check_router_balance(weight: float, trained: Sequence[str]) -> None:
    """Raise `UserError` where the load-balance loss has no router to train."""
    if weight and not any(".router." in name for name in trained):
        raise UserError(
            f"objective.router_balance_weight = {weight:g}: every router is frozen. Set it to 0, or train some: with "
            "lora, by router.proj in lora.target_modules; else by model.train_router, and no pattern of model.freeze "
            "that covers them."
        )


def _no_match(key: str, pattern: str, names: Sequence[str]) -> str:
    return f"{key}  {pattern!r} matches no name of the checkpoint.{did_you_mean(pattern, names)}"
