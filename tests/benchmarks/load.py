"""Load a checkpoint of real shapes and say what it took: memory, bytes, seconds, every value checked.

    python tests/benchmarks/load.py [--check] [--dir DIR] [--layers 2] [--processes 2] [--experts 1 2]

The checkpoint (`real_checkpoint.py`, 4.8 GB with two layers) is made in DIR if it is not there. Per expert-parallel
size, `--processes` ranks load it in bf16 under ZeRO-3, up to where DeepSpeed would wrap it. Of every rank:

- *memory*: anonymous memory (RssAnon; pages of mapped files can be dropped at any time and do not count), sampled by a
  thread, above what the process had before: imports and process group. Bound: its share of the weights + 0.5 GiB.
- *read*: bytes asked of the files. Bound: 1.05 times its share.
- *values*: every element that it holds against the file, read whole and sliced here; over all ranks the intervals must
  cover every tensor once.

The share is the model's bytes (all tensors but vision) over the ranks. With --check the exit code is 1 when a bound
is broken or a value differs. Dated results: README.md beside this file.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors import safe_open

from ds_dgemma.checkpoint.weights import WeightReader
from ds_dgemma.config.run import RunConfig
from ds_dgemma.engine.connect import connect
from ds_dgemma.engine.ds_config import deepspeed_config
from ds_dgemma.model.spec import read_spec
from ds_dgemma.model.stack import DiffusionGemmaStack
from ds_dgemma.ranks.layout import RankLayout, disconnect
from ds_dgemma.run.open_model import fill_model, outline_model
from tests.benchmarks.anonymous import PeakAnonymous, anonymous_bytes
from tests.benchmarks.real_checkpoint import make_checkpoint
from tests.gpu import ROOT, shapes
from tests.training import start_module

GIB = 2**30
DECODER = "model.decoder."


@dataclass(frozen=True)
class RankFigures:
    """What one rank reports."""

    base_bytes: int  # anonymous memory before loading
    peak_bytes: int  # during it
    longest_gap: float  # seconds between two samples
    read_bytes: int
    seconds: float
    intervals: dict[str, list[tuple[int, int]]]  # elements that were equal, by tensor and part of it


def load_as_rank(directory: Path, expert_parallel_size: int, out: Path) -> None:
    """Be one rank: load, measure, compare, report."""
    ranks = RankLayout.from_environment(expert_parallel_size)
    connect(ranks, timeout_minutes=10)
    run = RunConfig.model_validate(
        {
            "run": {"dir": str(out)},
            "model": {"path": str(directory)},
            "data": {"train": "none"},
            "train": {"max_steps": 1, "global_batch_size": ranks.world, "micro_batch_size": 1},
            "parallel": {"expert_parallel_size": expert_parallel_size},
            "deepspeed": ROOT / "ds_configs" / "zero3.json",
        }
    )
    settings = deepspeed_config(run, ranks.world, "cpu")
    base, began = anonymous_bytes(), time.perf_counter()
    with PeakAnonymous() as memory:
        outlined = outline_model(read_spec(str(directory)), directory, ranks, grouped_matmul=False)
        stack = fill_model(outlined, ranks, settings, "bf16")
    seconds = time.perf_counter() - began
    intervals = compare_with_files(stack, WeightReader(directory).files, directory, ranks)
    figures = RankFigures(base, memory.peak, memory.longest_gap, outlined.reader.bytes_read, seconds, intervals)
    (out / f"{ranks.rank}.json").write_text(json.dumps(asdict(figures)))
    disconnect()


def compare_with_files(
    stack: DiffusionGemmaStack, files: dict[str, str], directory: Path, ranks: RankLayout
) -> dict[str, list[tuple[int, int]]]:
    """Compare all that this rank holds with tensors read whole; return what it holds of each."""
    intervals: dict[str, list[tuple[int, int]]] = {}

    def read(tensor: str) -> torch.Tensor:
        with safe_open(directory / files[tensor], "pt") as file:
            return file.get_tensor(tensor)

    def compare(tensor: str, own: torch.Tensor, part: torch.Tensor, start: int, offset: int) -> None:
        flat = part.reshape(-1)[start : start + own.numel()]
        assert torch.equal(own[: flat.numel()], flat.to(own.dtype)), f"rank {ranks.rank}: {tensor} differs"
        assert not own[flat.numel() :].any(), f"rank {ranks.rank}: {tensor} is not padded with zeros"
        intervals.setdefault(tensor, []).append((offset + start, offset + start + flat.numel()))

    for name, parameter in stack.named_parameters():
        held: Any = parameter
        start = held.ds_zero_partition_rank * held.ds_tensor.numel()
        stem, _, leaf = name.rpartition(".experts.")
        if leaf not in ("w1", "w2", "w3"):
            compare(DECODER + name, held.ds_tensor, read(DECODER + name), start, 0)
            continue
        tensor = f"{DECODER}{stem}.{'down_proj' if leaf == 'w2' else 'gate_up_proj'}"
        part = read(tensor).chunk(ranks.expert_parallel_size)[ranks.rank % ranks.expert_parallel_size]
        offset = (ranks.rank % ranks.expert_parallel_size) * held.ds_numel
        if leaf != "w2":
            part = part.chunk(2, dim=1)[leaf == "w3"]
            tensor += f" {leaf}"
        compare(tensor, held.ds_tensor, part, start, offset)
    for number, layer in enumerate(stack.sweep_layers()):
        for side, scalar in (
            ("decoder", layer.layer_scalar),
            ("encoder.language_model", layer.encoder_layer_scalar),
        ):
            tensor = f"model.{side}.layers.{number}.layer_scalar"
            compare(tensor, scalar, read(tensor), 0, 0)
    return intervals


def model_bytes(directory: Path) -> dict[str, int]:
    """Bytes of every tensor but vision's."""
    reader = WeightReader(directory)
    return {name: 2 * math.prod(reader.shape(name)) for name in reader.files if "vision" not in name}


def run(directory: Path, processes: int, expert_parallel_size: int) -> list[str]:
    """Load with one topology, print its row, return what is wrong."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        arguments = ["tests.benchmarks.load", "--dir", str(directory), "--rank-reports", name]
        ranks = start_module([*arguments, "--experts", str(expert_parallel_size)], processes, out / "log")
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            return [f"EP {expert_parallel_size}: exit codes {codes}\n{(out / 'log').read_text()[-3000:]}"]
        reports = [RankFigures(**json.loads((out / f"{rank}.json").read_text())) for rank in range(processes)]
    sizes = model_bytes(directory)
    share = sum(sizes.values()) / processes
    problems = uncovered(sizes, reports)
    for rank, figures in enumerate(reports):
        memory = figures.peak_bytes - figures.base_bytes
        print(
            f"| {processes} | {expert_parallel_size} | {rank} | {share / GIB:.2f} | {memory / GIB:.2f} | "
            f"{figures.base_bytes / GIB:.2f} | {figures.longest_gap * 1e3:.0f} | {figures.read_bytes / GIB:.2f} | "
            f"{figures.read_bytes / share:.3f} | {figures.seconds:.1f} |",
            flush=True,
        )
        if memory > share + GIB / 2:
            problems.append(f"rank {rank}: {memory / GIB:.2f} GiB of memory, over its share + 0.5 GiB")
        if figures.read_bytes > 1.05 * share:
            problems.append(f"rank {rank}: {figures.read_bytes / share:.3f} times its share read")
    return [f"EP {expert_parallel_size}: {problem}" for problem in problems]


def uncovered(sizes: dict[str, int], reports: list[RankFigures]) -> list[str]:
    """Tensors of which the ranks together do not hold every element."""
    held: dict[str, set[tuple[int, int]]] = {}
    for figures in reports:
        for tensor, intervals in figures.intervals.items():
            held.setdefault(tensor, set()).update((start, stop) for start, stop in intervals if start < stop)
    elements: dict[str, int] = {}
    problems = []
    for tensor, intervals in held.items():
        ordered = sorted(intervals)
        if any(first[1] != second[0] for first, second in pairwise(ordered)):
            problems.append(f"{tensor}: {ordered} do not lie side by side")
        name = tensor.split()[0]
        elements[name] = elements.get(name, 0) + sum(stop - start for start, stop in ordered)
    wanted = {tensor: size // 2 for tensor, size in sizes.items()}
    missing = {tensor: count for tensor, count in wanted.items() if elements.get(tensor) != count}
    return problems + [f"{tensor}: {elements.get(tensor, 0)} of {count} elements" for tensor, count in missing.items()]


def main() -> int:
    """Make the checkpoint if it is missing, load it with every topology, compare with the bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bound is broken")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "ds_dgemma_real_shapes")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 1], help="expert-parallel sizes")
    parser.add_argument("--miniature", action="store_true", help="small shapes, to rehearse with")
    parser.add_argument("--rank-reports", type=Path, help=argparse.SUPPRESS)  # this process is a rank
    args = parser.parse_args()
    if args.rank_reports:
        load_as_rank(args.dir, args.experts[0], args.rank_reports)
        return 0
    make_checkpoint(shapes.config(args.miniature, args.layers), args.dir, shard_gb=1e-4 if args.miniature else 2)
    print("| ranks | EP | rank | share, GiB | memory, GiB | before, GiB | gap, ms | read, GiB | of share | seconds |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    problems = [problem for size in args.experts for problem in run(args.dir, args.processes, size)]
    print(*(problems or ["every value equals the file's; every bound holds"]), sep="\n")
    return 1 if problems and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
