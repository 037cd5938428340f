"""A plan for people (a table) and for programs (a dict)."""

from dataclasses import asdict
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ds_dgemma.plan.cost import Cost
from ds_dgemma.plan.memory import FRAGMENTATION, GIB, RUNTIME
from ds_dgemma.plan.plan import MOST_GPUS, Plan, Way


def as_dict(plan: Plan, tflops: float) -> dict[str, Any]:
    """Every figure, in bytes, FLOPs and seconds, for a GPU that reaches so many TFLOP/s."""
    needed, nearest = plan.memory, plan.nearest
    return {
        "model": plan.source,
        "parameters": plan.inventory.count,
        "trained_parameters": plan.inventory.trained_count,
        "fits": not plan.problems,
        "verdict": verdict(plan),
        "nearest": nearest and {"changes": nearest.changes, "needed": nearest.memory.needed},
        "memory": asdict(needed) | {"worst": needed.worst, "peak": needed.peak, "needed": needed.needed},
        "node_host_bytes": plan.node_bytes,
        "step": asdict(plan.cost) | {"seconds": plan.cost.flops / (tflops * 1e12)},
    }


def verdict(plan: Plan) -> str:
    """Whether it fits, and if not, what would."""
    on = f"{plan.setup.gpus} GPU{'s' if plan.setup.gpus > 1 else ''} of {plan.limits.gpu_memory:g} GiB"
    if not plan.problems:
        return f"Fits on {on}: {_needs(plan)}."
    text = f"Does not fit on {on}: {'; '.join(plan.problems)}."
    if plan.nearest is None:
        advice = f"take GPUs of more memory, set data.max_length below {plan.shape.clean}, or train less of it"
        return f"{text} Nothing near it does, on up to {MOST_GPUS} GPUs of this size: {advice}."
    lines = "".join(f"\n  {change}" for change in plan.nearest.changes)
    return f"{text}\nThis does ({_needs(plan.nearest)}):{lines}"


def _needs(way: Way) -> str:
    and_host = f", {way.node_bytes / GIB:.0f} GiB of a node's host memory" if way.node_bytes else ""
    return f"{way.memory.needed / GIB:.1f} GiB of a GPU{and_host}"


def tables(plan: Plan, tflops: float) -> Group:
    """The whole plan, the verdict last."""
    inventory, shape = plan.inventory, plan.shape
    heading = (
        f"{plan.source}: {inventory.count / 1e9:.2f} B parameters, {inventory.trained_count / 1e9:.2g} B trained; "
        f"{plan.setup.micro_batch_size} x ({shape.clean} + {shape.tokens - shape.clean}) tokens in a micro-batch"
    )
    table = Table("", "", show_header=False)
    table.columns[1].justify = "right"
    for section in (_sizes(plan), _step(plan.cost, tflops)):
        for row in section.items():
            table.add_row(*row)
        table.add_section()
    return Group(Text(heading), table, Text(verdict(plan), style="bold"))


def _sizes(plan: Plan) -> dict[str, str]:
    needed, worst = plan.memory, plan.memory.worst
    sizes = {f"on a GPU: {kind}": size for kind, size in needed.resident.items()}
    sizes |= {f"on a GPU for a moment ({worst}): {kind}": size for kind, size in needed.moments[worst].items()}
    sizes["on a GPU: peak of tensors"] = needed.peak
    sizes[f"with CUDA and NCCL ({RUNTIME / GIB:.0f}) and {FRAGMENTATION:.0%} lost between blocks"] = needed.needed
    sizes |= {f"in host memory, a rank: {kind}": size for kind, size in needed.host.items()}
    sizes["in host memory, a node's ranks together"] = plan.node_bytes
    return {f"GiB {where}": f"{size / GIB:,.2f}" for where, size in sizes.items() if size}


def _step(costs: Cost, tflops: float) -> dict[str, str]:
    return {
        "TFLOP of a GPU in an optimizer step": f"{costs.flops / 1e12:,.0f}",
        "TFLOP of a GPU, of them computed again or for nothing": f"{(costs.flops - costs.useful_flops) / 1e12:,.0f}",
        f"seconds of arithmetic at {tflops:g} TFLOP/s": f"{costs.flops / (tflops * 1e12):,.2f}",
        **{f"GB sent by a GPU: {name}": f"{size / 1e9:,.1f}" for name, size in costs.sent.items()},
        "GB on disk: a checkpoint": f"{costs.checkpoint / 1e9:,.1f}",
    }
