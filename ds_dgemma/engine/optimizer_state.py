"""What this rank owns of the training state: fp32 weights and the optimizer's moments, each as an interval of its
logical tensor.

A logical tensor is a parameter as if there were one rank: for experts, all of them. ZeRO stages keep the state in
different places; here each is only "a flat fp32 view and where it lies in the whole", so what is on disk does not
depend on stage or topology. Sources: deepspeed 0.19.8 `utils/tensor_fragment.py` (stages 1 to 3),
`runtime/zero/stage3.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from ds_dgemma.engine.sharding import is_expert_parameter
from ds_dgemma.ranks.layout import RankLayout

Kind = Literal["fp32", "exp_avg", "exp_avg_sq", "momentum_buffer"]
ADAM: tuple[Kind, ...] = ("fp32", "exp_avg", "exp_avg_sq")
MUON: tuple[Kind, ...] = ("fp32", "momentum_buffer")


@dataclass(frozen=True)
class OwnedShard:
    """Elements [start, stop) of the flattened logical tensor `name`, and how to read and write this rank's copy of
    them.
    """

    name: str
    start: int
    stop: int
    kinds: tuple[Kind, ...]  # what there is of them
    get: Callable[[Kind], torch.Tensor]  # flat fp32, stop - start elements
    set: Callable[[Kind, torch.Tensor], None]


def owned_shards(engine: Any, ranks: RankLayout) -> Iterator[OwnedShard]:
    """Every trainable parameter's part on this rank; a rank that owns nothing of a parameter skips it."""
    own = _zero3_shard if engine.zero_optimization_stage() == 3 else _zero12_shard
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        offset = ranks.expert_rank * _numel(parameter) if is_expert_parameter(parameter) else 0
        shard = own(engine, name, parameter, offset)
        if shard is not None and shard.stop > shard.start:
            yield shard


def create_moments(engine: Any, adam_step: float) -> None:
    """Give the optimizer its state before its first step, so that a checkpoint can be read into it; AdamW one step
    tensor for each.
    """
    optimizer = _basic(engine)
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    if isinstance(optimizer, DeepSpeedCPUAdam):
        _replay_steps(optimizer, int(adam_step))
    for number, tensor in enumerate(_masters(engine)):
        state = optimizer.state[tensor]
        if _is_muons(engine, number):
            state.setdefault("momentum_buffer", torch.zeros_like(tensor))
            continue
        for kind in ADAM[1:]:
            state.setdefault(kind, torch.zeros_like(tensor))
        if isinstance(optimizer, DeepSpeedCPUAdam):
            state["step"] = int(adam_step)
        else:
            state["step"] = torch.tensor(adam_step, dtype=torch.float32, device=tensor.device if on_device else "cpu")


def _replay_steps(optimizer: DeepSpeedCPUAdam, steps: int) -> None:
    """Bring DeepSpeed's CPU Adam to where `steps` steps leave it.

    It multiplies up beta^step from step to step, outside the state that is saved, and takes the power only where steps
    are not in sequence: a resumed run would round the bias correction another way.
    """
    nothing, betas = [torch.zeros(1) for _ in range(4)], optimizer.param_groups[0]["betas"]
    for step in range(1, steps + 1):
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, step, 0.0, *betas, 1.0, 0.0, True, *nothing)


def _masters(engine: Any) -> list[torch.Tensor]:
    """The flat fp32 partitions that the optimizer updates on this rank."""
    if engine.zero_optimization_stage() == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    if isinstance(engine.optimizer, BF16_Optimizer):  # DeepSpeed's own choice for stage 1 in bf16
        return engine.optimizer.fp32_groups_flat_partition
    return engine.optimizer.single_partition_of_fp32_groups


def adam_step(engine: Any) -> float:
    """How many updates were made, as AdamW counts them: fewer than the run's steps when some were skipped."""
    return next((float(state["step"]) for state in _basic(engine).state.values() if "step" in state), 0.0)


def _is_muons(engine: Any, number: int) -> bool:
    """Whether Muon updates a flat partition. (deepspeed 0.19.8 `stage3.py`; other stages have no Muon here.)"""
    return getattr(engine.optimizer, "use_muon", False) and engine.optimizer.sub_groups_using_muon[number]


def _basic(engine: Any) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _numel(parameter: Any) -> int:
    return parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()


def _zero3_shard(engine: Any, name: str, parameter: Any, offset: int) -> OwnedShard:
    share = parameter.ds_tensor.ds_numel
    start = min(parameter.ds_zero_partition_rank * share, parameter.ds_numel)
    count = min(share, parameter.ds_numel - start)

    def get(kind: Kind) -> torch.Tensor:
        if kind == "fp32":
            return safe_get_local_fp32_param(parameter)[:count]
        return safe_get_local_optimizer_state(parameter, kind)[:count]

    def put(kind: Kind, value: torch.Tensor) -> None:
        padded = value.new_zeros(share)  # DeepSpeed writes whole, padded shares
        padded[:count] = value
        if kind == "fp32":
            safe_set_local_fp32_param(parameter, padded)
        else:
            safe_set_local_optimizer_state(parameter, padded, kind)

    is_muons = getattr(engine.optimizer, "use_muon", False) and parameter.use_muon
    return OwnedShard(name, offset + start, offset + start + count, MUON if is_muons else ADAM, get, put)


def _zero12_shard(engine: Any, name: str, parameter: Any, offset: int) -> OwnedShard | None:
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    inside, flat = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
    owner = _masters(engine)[mapping.param_group_index]

    def view(kind: Kind) -> torch.Tensor:
        whole = owner if kind == "fp32" else _basic(engine).state[owner][kind]
        return whole.data.narrow(0, flat.start, flat.numel)

    start = offset + inside.start
    return OwnedShard(name, start, start + inside.numel, ADAM, view, lambda kind, value: _copy(view(kind), value))


def _copy(target: torch.Tensor, value: torch.Tensor) -> None:
    target.copy_(value)
