"""A plan for people (a table) and for programs (a dict)."""

from dataclasses import asdict
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ds_dgemma.plan.memory import FRAGMENTATION, GIB, RUNTIME, Memory
from ds_dgemma.plan.plan import MOST_GPUS, Plan
from ds_dgemma.plan.setup import Setup


def as_dict(plan: Plan, tflops: float) -> dict[str, Any]:
    """Every figure, in bytes, FLOPs and seconds, for a GPU that reaches so many TFLOP/s."""
    needed, nearest = plan.memory, plan.nearest
    return {
        "model": plan.source,
        "parameters": plan.inventory.count,
        "trained_parameters": plan.inventory.trained_count,
        "gpus": plan.setup.gpus,
        "fits": not plan.problems,
        "verdict": verdict(plan),
        "problems": plan.problems,
        "nearest": nearest
        and {"change": nearest.changes, "gpus": nearest.setup.gpus, "memory": asdict(nearest.memory)},
        "memory": asdict(needed) | {"worst": needed.worst, "peak": needed.peak, "needed": needed.needed},
        "node_host_bytes": plan.limits.node_bytes(needed, plan.setup),
        "step": asdict(plan.cost) | {"seconds": plan.cost.flops / (tflops * 1e12)},
    }


def verdict(plan: Plan) -> str:
    """Whether it fits, and if not, what would."""
    on = f"{plan.setup.gpus} GPU{'s' if plan.setup.gpus > 1 else ''} of {plan.limits.gpu_memory:g} GiB"
    if not plan.problems:
        return f"Fits on {on}: {_needs(plan, plan.memory, plan.setup)}."
    text = f"Does not fit on {on}: {'; '.join(plan.problems)}."
    if plan.nearest is None:
        most = f"on up to {MOST_GPUS} GPUs of this size"
        shorter = f"data.max_length below {plan.shape.clean}"
        return f"{text} Nothing near it does, {most}: take GPUs of more memory, set {shorter}, or train less of it."
    lines = "".join(f"\n  {change}" for change in plan.nearest.changes)
    return f"{text}\nThis does ({_needs(plan, plan.nearest.memory, plan.nearest.setup)}):{lines}"


def _needs(plan: Plan, needed: Memory, setup: Setup) -> str:
    host = plan.limits.node_bytes(needed, setup)
    and_host = f", {host / GIB:.0f} GiB of a node's host memory" if host else ""
    return f"{needed.needed / GIB:.1f} GiB of a GPU{and_host}"


def tables(plan: Plan, tflops: float) -> Group:
    """The whole plan, the verdict last."""
    count, shape, setup = plan.inventory.count, plan.shape, plan.setup
    heading = (
        f"{plan.source}: {count / 1e9:.2f} B parameters, {plan.inventory.trained_count / 1e9:.2g} B trained; {setup.gpus} x "
        f"expert parallel {setup.expert_parallel_size}, ZeRO-{setup.stage}, {str(setup.dtype).removeprefix('torch.')}, "
        f"{setup.micro_batch_size} example(s) of {shape.clean} + {shape.tokens - shape.clean} tokens in a micro-batch, "
        f"activation checkpointing {setup.activation_checkpointing}"
    )
    table = Table("", "", show_header=False)
    table.columns[1].justify = "right"
    for section in (_on_gpu(plan.memory), _on_host(plan), _step(plan, tflops)):
        for row in section.items():
            table.add_row(*row)
        table.add_section()
    return Group(Text(heading), table, Text(verdict(plan), style="bold"))


def _on_gpu(needed: Memory) -> dict[str, str]:
    worst = {f"{needed.worst} (the worst moment): {kind}": size for kind, size in needed.moments[needed.worst].items()}
    whole = f"with CUDA and NCCL ({RUNTIME / GIB:.0f} GiB) and {FRAGMENTATION:.0%} lost between blocks"
    sizes = {**needed.resident, **worst, "peak of tensors": needed.peak, whole: needed.needed}
    return {f"GiB on a GPU: {kind}": f"{size / GIB:,.2f}" for kind, size in sizes.items() if size}


def _on_host(plan: Plan) -> dict[str, str]:
    sizes = plan.memory.host | {"a node's ranks together": plan.limits.node_bytes(plan.memory, plan.setup)}
    return {f"GiB in host memory: {kind}": f"{size / GIB:,.2f}" for kind, size in sizes.items() if size}


def _step(plan: Plan, tflops: float) -> dict[str, str]:
    costs = plan.cost
    return {
        "an optimizer step: tokens of all GPUs": f"{costs.tokens:,}",
        "TFLOP of a GPU": f"{costs.flops / 1e12:,.0f}",
        "TFLOP of a GPU, of them computed again or for nothing": f"{(costs.flops - costs.useful_flops) / 1e12:,.0f}",
        f"seconds of arithmetic at {tflops:g} TFLOP/s": f"{costs.flops / (tflops * 1e12):,.2f}",
        **{f"GB sent by a GPU: {name}": f"{size / 1e9:,.1f}" for name, size in costs.sent.items()},
        "GB on disk: a checkpoint": f"{costs.checkpoint / 1e9:,.1f}",
    }
