"""What must divide what: a batch over ranks, ranks into expert groups, a model's experts over a group."""

from collections.abc import Sequence
from math import gcd, isqrt

from ds_dgemma.config.run import RunConfig
from ds_dgemma.errors import UserError, one_line_each


def check_topology(config: RunConfig, world_size: int) -> int:
    """Return the micro-batches per optimizer step on `world_size` ranks, or say which sizes would fit.

    Raises:
        UserError: the batch, or the ranks, do not divide.
    """
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    ep = config.parallel.expert_parallel_size
    problems = [batch_problem(batch, micro, world_size)]
    if world_size % ep:
        problems.append(
            f"parallel.expert_parallel_size = {ep}  does not divide {_ranks(world_size)}. "
            f"Set {either(divisors(world_size))}, or start a multiple of {ep} ranks."
        )
    if any(problems):
        raise one_line_each("the run config", [problem for problem in problems if problem])
    return batch // (micro * world_size)


def batch_problem(batch: int, micro: int, world_size: int) -> str:
    """Why a global batch cannot be cut into micro-batches of so many ranks; "" where it can."""
    per_pass = micro * world_size
    if batch % per_pass == 0:
        return ""
    nearest = sorted({max(batch // per_pass, 1) * per_pass, (batch // per_pass + 1) * per_pass})
    advice = f"train.global_batch_size {either(nearest)}"
    if batch % world_size == 0:
        advice += f", or train.micro_batch_size {either(divisors(batch // world_size))}"
    return (
        f"train.global_batch_size = {batch}  is not a multiple of {per_pass}, "
        f"train.micro_batch_size {micro} × {_ranks(world_size)}. Set {advice}."
    )


def check_experts(experts: int, expert_parallel_size: int, world_size: int) -> None:
    """Raise `UserError` where an expert group cannot share a layer's `experts` evenly."""
    if experts % expert_parallel_size:
        raise UserError(
            f"parallel.expert_parallel_size = {expert_parallel_size} does not divide the model's {experts} experts. "
            f"With {_ranks(world_size)}: {either(divisors(gcd(experts, world_size)))}."
        )


def divisors(number: int) -> list[int]:
    """Of a whole number, ascending."""
    below = [divisor for divisor in range(1, isqrt(number) + 1) if number % divisor == 0]
    return sorted({*below, *(number // divisor for divisor in below)})


def either(numbers: Sequence[int]) -> str:
    """2, 4 or 8"""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"
