"""The optimizers: which updates which parameters, and how DeepSpeed is given it.

AdamW is DeepSpeed's to make, from the `optimizer` block of its config. Muon (K. Jordan, 2024,
https://kellerjordan.github.io/posts/muon/) takes whole matrices, of which a ZeRO-3 rank holds a part: DeepSpeed gathers
a matrix's gradient and momentum, makes the update, and leaves each rank its share (deepspeed 0.19.8
`runtime/zero/stage3.py`, `_apply_muon_to_accumulated_grads`). An expert's matrix is a matrix of its own.
"""

import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ds_dgemma.config.optimizer import OptimizerSection
from ds_dgemma.engine import private
from ds_dgemma.model.names import checkpoint_name, matching

COMPILERS = ("cc", "gcc", "clang")  # that Triton looks for
ParameterGroups = list[dict[str, Any]]


class Chosen(NamedTuple):
    """What `deepspeed.initialize` is given."""

    make: Any  # a function of the groups that makes the optimizer; None: DeepSpeed does, by its config
    groups: Any
    deepspeed_config: dict[str, Any]
    after: Callable[[Any], None] = lambda engine: None  # what is done to the engine


def choose_optimizer(module: nn.Module, deepspeed_config: dict[str, Any], optimizer: OptimizerSection | None) -> Chosen:
    """The optimizer that a run's config names, AdamW without one."""
    if optimizer and optimizer.type == "muon":
        settings = {key: value for key, value in deepspeed_config.items() if key != "optimizer"}
        make = muon(deepspeed_config["optimizer"]["params"], in_fp32=not settings["bf16"]["enabled"])
        return Chosen(make, muon_groups(module, optimizer), settings, private.share_gradients_with_muon)
    return Chosen(None, parameter_groups(module, optimizer), deepspeed_config)


def parameter_groups(module: nn.Module, optimizer: OptimizerSection | None) -> ParameterGroups:
    """AdamW's groups over the trainable parameters; `lr_scale` is a group's share of the scheduled learning rate,
    `has_lr` whether that is the group's own.
    """
    left = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    groups: ParameterGroups = []
    for number, group in enumerate(optimizer.groups if optimizer else ()):
        picked = [left.pop(name) for name in list(left) if matching(group.match, [checkpoint_name(name)])]
        scale = group.lr / optimizer.lr if optimizer and group.lr else 1.0
        own = {} if group.weight_decay is None else {"weight_decay": group.weight_decay}
        name = f"group-{number}"
        groups.append({"name": name, "params": picked, "lr_scale": scale, "has_lr": group.lr is not None, **own})
    groups.append({"name": "rest", "params": list(left.values()), "lr_scale": 1.0, "has_lr": False})
    return [group for group in groups if group["params"]]


def is_muon_matrix(name: str, dimensions: int) -> bool:
    """Whether Muon updates a parameter: matrices between hidden states, each expert's too; no embedding, no router."""
    return dimensions >= 2 and "embed" not in name and ".router." not in name


def muon_groups(module: nn.Module, optimizer: OptimizerSection) -> ParameterGroups:
    """The groups of `parameter_groups`, each cut into Muon's matrices and AdamW's rest, with all that they need.

    DeepSpeed asks the parameters too which of the two they are.
    """
    for name, parameter in module.named_parameters():
        private.tag_for_muon(parameter, is_muon_matrix(name, len(private.shape_of(parameter))))
    own = {
        True: {"momentum": optimizer.muon_momentum, "lr": optimizer.muon_lr},
        False: {"betas": optimizer.betas, "eps": optimizer.eps, "lr": optimizer.lr},
    }
    groups = []
    for group in parameter_groups(module, optimizer):
        for use_muon, settings in own.items():
            picked = [p for p in group["params"] if getattr(p, "use_muon", False) is use_muon]
            if picked:
                scale = group["lr_scale"] if group["has_lr"] else settings["lr"] / optimizer.lr
                which = "muon" if use_muon else "adamw"
                groups.append(
                    {
                        "weight_decay": optimizer.weight_decay,
                        **group,
                        **settings,
                        "name": f"{group['name']}-{which}",
                        "params": picked,
                        "lr_scale": scale,
                        "use_muon": use_muon,
                    }
                )
    return groups


def muon(params: dict[str, Any], in_fp32: bool) -> Callable[[ParameterGroups], torch.optim.Optimizer]:
    """What makes DeepSpeed's Muon from such groups; `params` are the JSON's choice of a kernel for AdamW.

    `in_fp32`: the iteration that makes a matrix orthogonal computes in fp32 too, not in half precision.
    """
    from deepspeed.moe.utils import configure_moe_param_groups
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    if in_fp32:
        private.orthogonalise_in_fp32()
    if not torch.cuda.is_available() or not any(map(shutil.which, COMPILERS)):
        torch.compiler.set_stance("force_eager")  # compiling needs a compiler, and gains nothing on a CPU
    kernel = {name: value for name, value in params.items() if name in ("fused", "foreach")}

    def make(groups: ParameterGroups) -> torch.optim.Optimizer:
        return MuonWithAuxAdam(configure_moe_param_groups(groups), torch.optim.AdamW, kernel)

    return make
