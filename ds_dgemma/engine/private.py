"""What we touch of DeepSpeed that it does not promise, and what we take it to mean. No other file does, but for the
shape of a shard's parameter in `model/flops.py`, which may not import this one.

Written against deepspeed 0.19.8; the file that each name is of stands beside it. `tests/engine/test_private.py` holds
every meaning against the installed version: run it first after an upgrade, and what fails is what is to be read again.
"""

from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.module_inject.auto_ep_layer import _AllToAllV as AllToAll  # rows by split sizes, and back in backward
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.utils import groups
from torch import nn

__all__ = ["EXPERT_TAGS", "AllToAll"]

# AutoEP's marks of one rank's part of the experts (`module_inject/auto_ep_layer.py`)
EXPERT_TAGS = ("allreduce", "group_name", "ds_zero_placement_family", "ds_zero_partition_group_name", "is_expert_group")


class Interval(NamedTuple):
    """Elements [start, stop) of a flattened parameter that are this rank's; its share has `padded` elements."""

    start: int
    stop: int
    padded: int


def expert_replicas(size: int) -> Any:
    """Make the groups of an expert-parallel size, which the engine finds and reuses; the group of the ranks that hold
    the same experts as this one. (`utils/groups.py`)
    """
    groups._create_expert_and_data_parallel(size)
    return groups._get_expert_data_parallel_group(f"ep_size_{size}")


def is_expert_parameter(parameter: torch.Tensor) -> bool:
    """Whether AutoEP tagged this parameter as one rank's part of the experts."""
    return getattr(parameter, "ds_zero_placement_family", None) == "autoep_expert"


def partition(parameter: Any, init: deepspeed.zero.Init, group: Any) -> Interval:
    """Make a ZeRO-3 parameter of a real one, over the ranks of `group` (None: of all), and leave this rank its share:
    what it is, in `held`. (`runtime/zero/partition_parameters.py`, `Init._convert_to_deepspeed_param`)
    """
    if group is not None:
        parameter.ds_zero_partition_process_group = group
    init._convert_to_deepspeed_param(parameter)
    parameter.partition()
    return interval(parameter)


def held(parameter: Any) -> torch.Tensor:
    """This rank's share of a ZeRO-3 parameter, padded, in the type that is computed in."""
    return parameter.ds_tensor.data


def interval(parameter: Any) -> Interval:
    """Which elements of a ZeRO-3 parameter are this rank's."""
    share = parameter.ds_tensor.ds_numel
    start = min(parameter.ds_zero_partition_rank * share, parameter.ds_numel)
    return Interval(start, min(start + share, parameter.ds_numel), share)


def shape_of(parameter: Any) -> torch.Size:
    """The shape of a parameter as the model made it; ZeRO-3's shards have none."""
    return getattr(parameter, "ds_shape", parameter.shape)


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer below ZeRO's."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def masters(engine: Any) -> list[torch.Tensor]:
    """The flat fp32 partitions that the optimizer updates on this rank. (`runtime/zero/stage3.py`,
    `stage_1_and_2.py`, `runtime/bf16_optimizer.py`)
    """
    if engine.zero_optimization_stage() == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    if isinstance(engine.optimizer, BF16_Optimizer):  # DeepSpeed's own choice for stage 1 in bf16
        return engine.optimizer.fp32_groups_flat_partition
    return engine.optimizer.single_partition_of_fp32_groups


class Fragment(NamedTuple):
    """What of a parameter lies in a partition of `masters`, below ZeRO-3."""

    partition: int
    place: slice  # in it
    start: int  # in the flattened parameter


def fragment(parameter: Any) -> Fragment | None:
    """This rank's fragment of a parameter; None where it has none. (`utils/tensor_fragment.py`)"""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    inside, flat = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
    return Fragment(mapping.param_group_index, slice(flat.start, flat.start + flat.numel), inside.start)


def advance_cpu_adam(optimizer: DeepSpeedCPUAdam, steps: int) -> None:
    """Bring DeepSpeed's CPU Adam to where `steps` steps leave it. (`csrc/includes/cpu_adam.h`, `IncrementStep`)

    It multiplies up beta^step from step to step, outside the state that is saved, and takes the power only where steps
    are not in sequence: a resumed run would round the bias correction another way.
    """
    nothing, betas = [torch.zeros(1) for _ in range(4)], optimizer.param_groups[0]["betas"]
    for step in range(1, steps + 1):
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, step, 0.0, *betas, 1.0, 0.0, True, *nothing)


def forget_gradients(engine: Any) -> None:
    """Forget what was accumulated for an update that was left out. (`stage_1_and_2.py`, `step`: with an offloaded
    optimizer it keeps the buffer that the next step adds to, and every later step would be skipped too)
    """
    if engine.zero_optimization_stage() < 3 and hasattr(engine.optimizer, "averaged_gradients"):
        engine.optimizer.averaged_gradients = dict.fromkeys(engine.optimizer.averaged_gradients)


def count_steps_done(engine: deepspeed.DeepSpeedEngine, steps: int) -> None:
    """Tell a resumed engine how far the run is. (`runtime/engine.py`)"""
    engine.global_steps = steps
    engine.micro_steps = steps * engine.gradient_accumulation_steps()
    engine.global_samples = steps * engine.train_batch_size()


def tag_for_muon(parameter: nn.Parameter, is_muons: bool) -> None:
    """Say which parameters Muon updates; DeepSpeed tags by module those that were not born partitioned. (`__init__.py`,
    `set_optimizer_flags`)
    """
    parameter.use_muon = is_muons  # pyright: ignore[reportAttributeAccessIssue]


def is_muons(engine: Any, parameter: Any) -> bool:
    """Whether Muon updates a parameter; only ZeRO-3 has Muon here."""
    return getattr(engine.optimizer, "use_muon", False) and parameter.use_muon


def is_muons_partition(engine: Any, number: int) -> bool:
    """Whether Muon updates a partition of `masters`. (`runtime/zero/stage3.py`)"""
    return getattr(engine.optimizer, "use_muon", False) and engine.optimizer.sub_groups_using_muon[number]


def orthogonalise_in_fp32() -> None:
    """Have Muon's iteration compute in fp32, not in half precision. (`runtime/zero/muon/original_muon.py`)"""
    from deepspeed.runtime.zero.muon import original_muon

    original_muon.ns_compute_dtype = lambda ns_method="gram": torch.float32


def share_gradients_with_muon(engine: Any) -> None:
    """Have each rank sent its share of a gradient, not the whole: half the bytes.

    DeepSpeed refuses that beside Muon at the start, from when Muon took gradients on their way; now it gathers the
    shares that were summed up. (`runtime/zero/stage3.py`, `_apply_muon_to_accumulated_grads`)
    """
    engine.optimizer.reduce_scatter = True


def without_shared_memory() -> None:
    """Leave out the shared-memory all-reduce that DeepSpeed would compile at start on a CPU: it needs a compiler, and
    the lock of a build that was killed makes every later run wait for ever; gloo does the same. (`ops/__init__.py`)
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
