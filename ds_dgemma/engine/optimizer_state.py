"""What this rank owns of the training state: fp32 weights and the optimizer's moments, each as an interval of its
logical tensor.

A logical tensor is a parameter as if there were one rank: for experts, all of them. ZeRO stages keep the state in
different places; here each is only "a flat fp32 view and where it lies in the whole", so what is on disk does not
depend on stage or topology.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from ds_dgemma.engine import private
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
        offset = (
            ranks.expert_rank * private.shape_of(parameter).numel() if private.is_expert_parameter(parameter) else 0
        )
        shard = own(engine, name, parameter, offset)
        if shard is not None and shard.stop > shard.start:
            yield shard


def create_moments(engine: Any, adam_step: float) -> None:
    """Give the optimizer its state before its first step, so that a checkpoint can be read into it; AdamW one step
    tensor for each.
    """
    optimizer = private.base_optimizer(engine)
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    if isinstance(optimizer, DeepSpeedCPUAdam):
        private.advance_cpu_adam(optimizer, int(adam_step))
    for number, tensor in enumerate(private.masters(engine)):
        state = optimizer.state[tensor]
        if private.is_muons_partition(engine, number):
            state.setdefault("momentum_buffer", torch.zeros_like(tensor))
            continue
        for kind in ADAM[1:]:
            state.setdefault(kind, torch.zeros_like(tensor))
        if isinstance(optimizer, DeepSpeedCPUAdam):
            state["step"] = int(adam_step)
        else:
            state["step"] = torch.tensor(adam_step, dtype=torch.float32, device=tensor.device if on_device else "cpu")


def adam_step(engine: Any) -> float:
    """How many updates were made, as AdamW counts them: fewer than the run's steps when some were skipped."""
    return next(
        (float(state["step"]) for state in private.base_optimizer(engine).state.values() if "step" in state), 0.0
    )


def _zero3_shard(engine: Any, name: str, parameter: Any, offset: int) -> OwnedShard:
    own = private.interval(parameter)
    count = own.stop - own.start

    def get(kind: Kind) -> torch.Tensor:
        if kind == "fp32":
            return safe_get_local_fp32_param(parameter)[:count]
        return safe_get_local_optimizer_state(parameter, kind)[:count]

    def put(kind: Kind, value: torch.Tensor) -> None:
        padded = value.new_zeros(own.padded)  # DeepSpeed writes whole, padded shares
        padded[:count] = value
        if kind == "fp32":
            safe_set_local_fp32_param(parameter, padded)
        else:
            safe_set_local_optimizer_state(parameter, padded, kind)

    kinds = MUON if private.is_muons(engine, parameter) else ADAM
    return OwnedShard(name, offset + own.start, offset + own.stop, kinds, get, put)


def _zero12_shard(engine: Any, name: str, parameter: Any, offset: int) -> OwnedShard | None:
    own = private.fragment(parameter)
    if own is None:
        return None
    owner = private.masters(engine)[own.partition]

    def view(kind: Kind) -> torch.Tensor:
        whole = owner if kind == "fp32" else private.base_optimizer(engine).state[owner][kind]
        return whole.data[own.place]

    start = offset + own.start
    stop = start + own.place.stop - own.place.start
    return OwnedShard(name, start, stop, ADAM, view, lambda kind, value: _copy(view(kind), value))


def _copy(target: torch.Tensor, value: torch.Tensor) -> None:
    target.copy_(value)
