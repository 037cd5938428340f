"""A plan for people (tables) and for programs (a dict)."""

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ds_dgemma.plan.memory import FRAGMENTATION, GIB, IMBALANCE, RUNTIME, Memory
from ds_dgemma.plan.plan import MOST_GPUS, Limits, Plan, host_bytes
from ds_dgemma.plan.setup import Setup

GB = 1e9


def as_dict(plan: Plan) -> dict[str, Any]:
    """Every figure, in bytes, FLOPs and seconds."""
    needed, costs = plan.memory, plan.cost
    nearest = None
    if plan.nearest is not None:
        changes, setup, memory = plan.nearest
        nearest = {"change": list(changes), "gpus": setup.gpus, "needed_bytes": memory.needed}
    return {
        "model": plan.source,
        "parameters": plan.inventory.total,
        "trained_parameters": plan.inventory.trained,
        "gpus": plan.setup.gpus,
        "fits": not plan.problems,
        "verdict": verdict(plan),
        "problems": list(plan.problems),
        "nearest": nearest,
        "gpu": {
            "resident": needed.resident,
            "moments": needed.moments,
            "largest_moment": needed.largest_moment,
            "peak_bytes": needed.peak,
            "needed_bytes": needed.needed,
        },
        "host": {"rank": needed.host, "node_bytes": host_bytes(needed, plan.setup, plan.limits)},
        "disk": plan.disk,
        "step": {
            "tokens": costs.tokens,
            "useful_flops_per_gpu": costs.useful_flops,
            "flops_per_gpu": costs.flops,
            "sent_bytes_per_gpu": costs.sent,
            "seconds": costs.seconds | {"step": costs.step_seconds},
            "tokens_per_second": costs.tokens / costs.step_seconds,
        },
    }


def verdict(plan: Plan) -> str:
    """Whether it fits, and if not, what would."""
    on = f"{plan.setup.gpus} GPU{'s' if plan.setup.gpus > 1 else ''} of {plan.limits.gpu_memory:g} GiB"
    if not plan.problems:
        return f"Fits on {on}: {_needs(plan.memory, plan.setup, plan.limits)}."
    text = f"Does not fit on {on}: {'; '.join(plan.problems)}."
    if plan.nearest is None:
        return (
            f"{text} Nothing near it does, on up to {MOST_GPUS} GPUs of this size: {plan.advice}, or train less of it."
        )
    changes, setup, memory = plan.nearest
    lines = "".join(f"\n  {change}" for change in changes)
    return f"{text}\nThe nearest that does ({_needs(memory, setup, plan.limits)}):{lines}"


def _needs(needed: Memory, setup: Setup, limits: Limits) -> str:
    host = host_bytes(needed, setup, limits)
    and_host = f", {host / GIB:.0f} GiB of a node's host memory" if host else ""
    return f"{needed.needed / GIB:.1f} GiB of a GPU{and_host}"


def tables(plan: Plan) -> Group:
    """The whole plan, the verdict last."""
    parts = [_heading(plan), _gpu(plan)]
    if plan.memory.host:
        parts.append(_host(plan))
    return Group(*parts, _step(plan), Text(verdict(plan), style="bold"))


def _heading(plan: Plan) -> Text:
    total, trained, shape, setup = plan.inventory.total, plan.inventory.trained, plan.shape, plan.setup
    return Text(
        f"{plan.source}: {total / 1e9:.2f} B parameters, {_count(trained)} trained; {setup.gpus} x expert parallel "
        f"{setup.expert_parallel_size}, ZeRO-{setup.zero.stage}, {str(setup.dtype).removeprefix('torch.')}, "
        f"{setup.micro_batch_size} example(s) of {shape.clean} + {shape.canvas} tokens in a micro-batch, "
        f"activation checkpointing {setup.activation_checkpointing}"
    )


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e8 else f"{number / 1e6:.1f} M"


def _gpu(plan: Plan) -> Table:
    needed = plan.memory
    table = Table("on a GPU", "GiB", title_justify="left")
    table.columns[1].justify = "right"
    for kind, size in needed.resident.items():
        table.add_row(kind, _gib(size))
    table.add_section()
    for name, parts in needed.moments.items():
        worst = name == needed.largest_moment
        table.add_row(f"{name}{' (the worst moment)' if worst else ''}", _gib(sum(parts.values())))
        if worst:
            for kind, size in parts.items():
                if size:
                    table.add_row(f"  {kind}", _gib(size), style="dim")
    table.add_section()
    table.add_row("peak of tensors", _gib(needed.peak))
    table.add_row(
        f"with CUDA and NCCL ({RUNTIME / GIB:.0f} GiB) and {FRAGMENTATION:.0%} lost between blocks", _gib(needed.needed)
    )
    return table


def _host(plan: Plan) -> Table:
    table = Table("in host memory, a rank", "GiB")
    table.columns[1].justify = "right"
    for kind, size in plan.memory.host.items():
        table.add_row(kind, _gib(size))
    table.add_section()
    table.add_row("a node's ranks together", _gib(host_bytes(plan.memory, plan.setup, plan.limits)))
    return table


def _step(plan: Plan) -> Table:
    costs = plan.cost
    table = Table("an optimizer step, all examples this long", "", "seconds")
    for column in table.columns[1:]:
        column.justify = "right"
    again = costs.flops - costs.useful_flops
    table.add_row(
        "arithmetic of a GPU, TFLOP (of it computed again, or for nothing)",
        f"{costs.flops / 1e12:,.0f} ({again / 1e12:,.0f})",
        _seconds(costs.seconds["arithmetic"]),
    )
    for name, size in costs.sent.items():
        seconds = costs.seconds.get(name)
        table.add_row(f"{name}, GB sent by a GPU", f"{size / GB:,.1f}", "" if seconds is None else _seconds(seconds))
    if costs.sent:
        table.add_row("gather and reduce, beside the arithmetic", "", _seconds(costs.seconds["gather and reduce"]))
    if costs.host_traffic:
        table.add_row(
            "to and from host memory, GB", f"{costs.host_traffic / GB:,.1f}", _seconds(costs.seconds["host link"])
        )
        table.add_row("optimizer in host memory", "", _seconds(costs.seconds["optimizer in host memory"]))
    table.add_section()
    rate = f"{costs.tokens / costs.step_seconds:,.0f} tokens/s"
    table.add_row(f"{costs.tokens:,} tokens", rate, _seconds(costs.step_seconds))
    table.add_section()
    for name, size in plan.disk.items():
        table.add_row(f"disk: {name}, GB", f"{size / GB:,.1f}", "")
    if plan.setup.expert_parallel_size > 1:
        table.caption = f"the busiest rank's experts get {IMBALANCE:g} x the mean"
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f}"
