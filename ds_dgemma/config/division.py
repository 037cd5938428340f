"""What must divide what: batch by ranks, ranks and experts by expert-parallel ranks. Each is asked here alone."""

from collections.abc import Mapping, Sequence
from math import gcd, isqrt

from ds_dgemma.config.run import ParallelSection, RunConfig
from ds_dgemma.errors import UserError, one_line_each


def check_topology(config: RunConfig, world_size: int) -> int:
    """Return the micro-batches per optimizer step on `world_size` ranks, or say which sizes would fit."""
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    ep = config.parallel.expert_parallel_size
    per_pass = micro * world_size
    problems = []
    if batch % per_pass:
        nearest = sorted({max(batch // per_pass, 1) * per_pass, (batch // per_pass + 1) * per_pass})
        advice = f"train.global_batch_size {either(nearest)}"
        if batch % world_size == 0:
            advice += f", or train.micro_batch_size {either(divisors(batch // world_size))}"
        problems.append(
            f"train.global_batch_size = {batch}  is not a multiple of {per_pass}, "
            f"train.micro_batch_size {micro} × {ranks(world_size)}. Set {advice}."
        )
    if world_size % ep:
        problems.append(
            f"parallel.expert_parallel_size = {ep}  does not divide {ranks(world_size)}. "
            f"Set {either(divisors(world_size))}, or start a multiple of {ep} ranks."
        )
    if problems:
        raise one_line_each("the run config", problems)
    return batch // per_pass


def check_experts(experts: int, expert_parallel_size: int, world_size: int) -> None:
    """Raise `UserError` unless a layer's experts can be split over so many ranks."""
    if experts % expert_parallel_size:
        fitting = [n for n in divisors(world_size) if experts % n == 0]
        raise UserError(
            f"parallel.expert_parallel_size = {expert_parallel_size} does not divide the model's {experts} experts. "
            f"With {ranks(world_size)}: {either(fitting)}."
        )


def check_expert_groups(parallel: ParallelSection, slots: Mapping[str, int]) -> None:
    """Keep every expert group inside one node, unless the config allows otherwise.

    Groups are neighbouring ranks and ranks are numbered node by node, so they fit when they divide every node.

    Raises:
        UserError: the nodes that a group would leave, and what to set.
    """
    ep = parallel.expert_parallel_size
    split = [f"{host} has {count}" for host, count in slots.items() if count % ep]
    if split and not parallel.expert_groups_across_nodes:
        raise UserError(
            f"parallel.expert_parallel_size = {ep}  does not divide the ranks of every node: {', '.join(split)}. Set "
            f"it to {gcd(ep, *slots.values())}, or let groups reach across: parallel.expert_groups_across_nodes true."
        )


def divisors(number: int) -> list[int]:
    """In order, 1 and the number included."""
    below = [divisor for divisor in range(1, isqrt(number) + 1) if number % divisor == 0]
    return sorted({*below, *(number // divisor for divisor in below)})


def either(numbers: Sequence[int]) -> str:
    """2, 4 or 8"""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


def ranks(count: int) -> str:
    """1 rank, 2 ranks"""
    return "1 rank" if count == 1 else f"{count} ranks"
