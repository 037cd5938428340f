"""Hold a training step's memory against what `ds-dgemma plan` says, kind by kind.

    python -m tests.benchmarks.memory --model DIR [--processes 2 --expert-parallel 2] [--set lora.r=16 ...]

Runs `ds_dgemma.train` itself for two steps, one process per rank, on sentences made on the spot. Just before the
second update every kind is counted where DeepSpeed holds it (moments exist then, gradients are complete): `ds_tensor`
of every parameter, `fp32_partitioned_groups_flat`, the optimizer's state, gradient and bucket buffers. The largest
rank is printed beside the plan; exit code 1 where weights, masters, moments or gradients differ by more than 10 %.

The peak is of anonymous memory above what the interpreter had before the model was built (CPU), or of CUDA's
allocator; on the CPU it also has what a GPU would not: the loader, gloo's buffers, temporaries of loops over experts.
What a rank sends is counted in the second step.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from tests.benchmarks.anonymous import PeakAnonymous, anonymous_bytes
from tests.forks import start

ROOT = Path(__file__).resolve().parents[2]
COMPARED = ("weights", "fp32 master", "moments", "gradients")
TOLERANCE = 0.10
MIB = 2**20
RUN = """
run: {{dir: {folder}/run, resume: never}}
model: {{path: {model}}}
data: {{train: {folder}/train.jsonl, workers: 0, max_length: {length}, over_length: truncate}}
train: {{max_steps: 2, global_batch_size: {batch}, micro_batch_size: 1}}
parallel: {{expert_parallel_size: {ep}}}
checkpoint: {{every: 0}}
deepspeed: {deepspeed}
"""


def nbytes(tensors: Iterable[Tensor | None], counted: set[int]) -> int:
    """Bytes of the distinct storages behind tensors, each counted once over all calls that share `counted`."""
    total = 0
    for tensor in tensors:
        if tensor is None or tensor.numel() == 0:
            continue
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def count_kinds(engine: Any) -> dict[str, int]:
    """Bytes of each kind that this rank holds, on whatever device."""
    optimizer, seen = engine.optimizer, set()
    inner = getattr(optimizer, "optimizer", optimizer)
    parameters = list(engine.module.parameters())
    kinds = {"weights": nbytes((getattr(p, "ds_tensor", p) for p in parameters), seen)}
    whole = [p for p in parameters if getattr(p, "ds_persist", False)]
    kinds["weights kept whole"] = nbytes((p.data for p in whole), seen)
    if engine.zero_optimization_stage() == 3:
        masters = optimizer.fp32_partitioned_groups_flat
        gradients = [optimizer.grad_partitions_flat_buffer]
    elif hasattr(optimizer, "fp32_groups_flat_partition"):  # stage 1 in bf16
        masters, gradients = optimizer.fp32_groups_flat_partition, optimizer.fp32_groups_gradients_flat
    else:
        masters = optimizer.single_partition_of_fp32_groups
        gradients = [getattr(p, "grad_accum", None) for p in parameters] + [p.grad for p in parameters]
        gradients += [t for group in optimizer.averaged_gradients.values() if group for t in group]
    kinds["fp32 master"] = nbytes(masters, seen)
    state = [value for held in inner.state.values() for value in held.values() if isinstance(value, Tensor)]
    kinds["moments"] = nbytes(state, seen)
    buckets = [bucket.buffer for bucket in getattr(optimizer, "ipg_buckets", {}).values()]
    flat = [b for bucket in buckets for b in (bucket if isinstance(bucket, list) else [bucket])]
    kinds["reduce bucket"] = nbytes(flat, seen)
    kinds["gradients"] = nbytes(gradients, seen) + nbytes((master.grad for master in masters), seen)
    return kinds


class Traffic:
    """Bytes that this rank sends in rings, by collective, counted where torch is asked for them."""

    def __init__(self) -> None:
        self.sent: dict[str, float] = {}
        for function, kind in (
            ("all_gather_into_tensor", "all-gather"),
            ("all_gather", "all-gather"),
            ("reduce_scatter_tensor", "reduce"),
            ("all_to_all_single", "all-to-all"),
        ):
            self._count(function, kind)

    def _count(self, function: str, kind: str) -> None:
        really = getattr(torch.distributed, function)

        def counting(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            ranks = torch.distributed.get_world_size(kwargs.get("group"))
            whole = tensors[1] if kind == "all-to-all" else max(tensors, key=Tensor.numel)  # there: what is sent
            if whole.is_floating_point():
                size = ranks * whole.nbytes if function == "all_gather" else whole.nbytes  # into a list
                self.sent[kind] = self.sent.get(kind, 0) + size * (ranks - 1) / ranks
            return really(*args, **kwargs)

        setattr(torch.distributed, function, counting)


def measure(arguments: list[str], out: Path) -> None:
    """Be one rank: train, count just before the second update, write what was seen."""
    from ds_dgemma import train

    update, traffic, seen = train.update, Traffic(), {}

    def measured_update(engine: Any, batches: Any, step: int, *rest: Any) -> Any:
        really_step = engine.step

        def counting_step() -> None:
            if step == 2 and engine.is_gradient_accumulation_boundary():
                seen.update(count_kinds(engine))
            really_step()

        engine.step = counting_step
        traffic.sent.clear()
        try:
            return update(engine, batches, step, *rest)
        finally:
            engine.step = really_step
            seen.update({f"sent: {kind}": round(size) for kind, size in traffic.sent.items()})

    train.update = measured_update
    before = anonymous_bytes()
    with PeakAnonymous() as memory:
        code = train.main(arguments)
    on_gpu = torch.cuda.is_available()
    seen["peak"] = torch.cuda.max_memory_allocated() if on_gpu else memory.peak - before
    out.write_text(json.dumps(seen))
    sys.stdout.flush()
    os._exit(code)


def planned_kinds(config: Path, overrides: list[str], processes: int) -> dict[str, int]:
    """The same kinds as `plan` has them, wherever they lie; for examples as long as those of the second step."""
    from ds_dgemma.config.file import load_config
    from ds_dgemma.plan.plan import Limits, make_plan, read_shapes

    settings = load_config(config, overrides)
    metrics = (settings.run.dir / "metrics.jsonl").read_text().splitlines()
    tokens = json.loads(metrics[-1])["tokens"] // settings.train.global_batch_size
    spec, _ = read_shapes(settings)
    plan = make_plan(settings, processes, Limits(80, None, 8), tokens - spec.canvas_length)
    needed, kinds = plan.memory, dict(plan.memory.resident)
    kinds |= {f"sent: {kind}": size for kind, size in plan.cost.sent.items()}
    for kind, size in needed.host.items():
        kind = kind.removesuffix(", for the optimizer")
        kinds[kind] = kinds.get(kind, 0) + size
    return kinds | {"peak": needed.peak + sum(needed.host.values())}


def write_data(file: Path, examples: int) -> None:
    """Conversations that are longer than any length asked for."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "numbers", "pass", "by"]
    with file.open("w") as stream:
        for example in range(examples):
            say = [" ".join(words[(example + 7 * i) % len(words)] for i in range(n)) for n in (8, 2000)]
            roles = ("user", "assistant")
            messages = [{"role": role, "content": text} for role, text in zip(roles, say, strict=True)]
            stream.write(json.dumps({"messages": messages}) + "\n")


def run(args: argparse.Namespace, folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Measure all ranks; return the plan and the largest rank's bytes."""
    from ds_dgemma.ranks.layout import free_port

    write_data(folder / "train.jsonl", 16 * args.processes)
    config = folder / "run.yaml"
    text = RUN.format(
        folder=folder, model=args.model.resolve(), length=args.length, batch=args.processes * args.accumulation,
        ep=args.expert_parallel, deepspeed=args.deepspeed.resolve(),
    )  # fmt: skip
    config.write_text(text)
    overrides = [part for override in args.set for part in ("--set", override)]
    shared = dict(
        os.environ,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
        WORLD_SIZE=str(args.processes),
        LOCAL_WORLD_SIZE=str(args.processes),
    )
    ranks = []
    for rank in range(args.processes):
        child = ["tests.benchmarks.memory", "--child", str(folder / f"{rank}.json"), "--config", str(config)]
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(start([*child, *overrides], environment, sys.stdout.buffer))
    deadline = time.monotonic() + args.timeout
    try:
        codes = [rank.wait(max(1.0, deadline - time.monotonic())) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(codes):
        raise SystemExit(f"exit codes {codes}")
    seen = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(args.processes)]
    planned = planned_kinds(config, args.set, args.processes)
    return planned, {kind: max(rank[kind] for rank in seen) for kind in seen[0]}


def report(planned: dict[str, int], seen: dict[str, int]) -> tuple[str, bool]:
    """Markdown, and whether every compared kind is close."""
    lines, close = ["| kind, MiB of a rank | plan | measured | difference |", "|---|---|---|---|"], True
    for kind, measured in seen.items():
        said = planned.get(kind, 0)
        difference = (said - measured) / measured if measured else float(said != 0)
        lines.append(f"| {kind} | {said / MIB:,.1f} | {measured / MIB:,.1f} | {difference:+.1%} |")
        close = close and (kind not in COMPARED or abs(difference) <= TOLERANCE)
    return "\n".join(lines), close


def main(argv: list[str]) -> int:
    """Measure and compare; 1 when a state differs by more than the tolerance."""
    if argv[:1] == ["--child"]:
        measure(argv[2:], Path(argv[1]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint with a tokenizer")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--expert-parallel", type=int, default=1)
    parser.add_argument("--length", type=int, default=512, help="tokens of prompt and response")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--deepspeed", type=Path, default=ROOT / "ds_configs/zero3.json")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", help="as for ds_dgemma.train")
    parser.add_argument("--timeout", type=float, default=900, help="seconds")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        planned, seen = run(args, Path(folder))
    table, close = report(planned, seen)
    print(table)
    return 0 if close else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
