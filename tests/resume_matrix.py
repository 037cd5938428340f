"""Resume on any topology: from each of (1, 1), (2, 1), (2, 2), (4, 2) processes and expert ranks, on each of them.

    python -m tests.resume_matrix [--steps N] [--pairs N [--seed S]]

A run makes 20 steps and a checkpoint at the 10th, behind the warm-up. On every topology it goes on from there, and its
last 10 steps are held against the uninterrupted ones: the largest relative difference of losses and gradient norm
must stay below 1e-4. Full training has two parameter groups with learning rates and weight decays of their own, LoRA
has experts and a group for B, and the frozen run leaves out a layer, the embedding and self-conditioning. fp32, top-2
of 8 experts; accumulation follows from batch and ranks. `--pairs N` draws N of every 16 pairs.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.training import make_run, train

TOPOLOGIES = ((1, 1), (2, 1), (2, 2), (4, 2))  # processes, expert-parallel size
SETTINGS = {
    "full": ["optimizer.groups=[{match: '*.experts.*', lr: 3e-4, weight_decay: 0.0}, {match: '*norm*', lr: 1e-4}]"],
    "lora": [
        "lora={target_parameters: [experts.gate_up_proj, experts.down_proj], init_lora_weights: false}",
        "optimizer.groups=[{match: '*.lora_B', lr: 3e-4, weight_decay: 0.0}]",
    ],
    "frozen": [
        "model.freeze=['*.embed_tokens.weight', '*.self_conditioning.*', '*.layers.0.*', '*.experts.down_proj']"
    ],
}
MICRO_BATCH = 2
COMPARED = ("loss", "loss_diffusion", "loss_ar", "grad_norm")
TOLERANCE = 1e-4

Topology = tuple[int, int]


def go_on(config: Path, run_dir: Path, settings: list[str], topology: Topology, steps: int) -> list[dict]:
    """Train to the last step, from wherever the run directory stands."""
    processes, experts = topology
    lengths = [f"train.max_steps={steps}", f"checkpoint.every={steps // 2}", f"optimizer.warmup_steps={steps // 4}"]
    shares = [f"train.micro_batch_size={MICRO_BATCH}", f"parallel.expert_parallel_size={experts}"]
    return train(config, run_dir, [*lengths, *shares, *settings], processes)


def difference(ours: list[dict], theirs: list[dict], steps: int) -> float:
    """The largest relative difference behind the middle."""
    assert [record["step"] for record in ours] == [record["step"] for record in theirs] == list(range(1, steps + 1))
    pairs = zip(ours[steps // 2 :], theirs[steps // 2 :], strict=True)
    return max(abs(a[name] - b[name]) / abs(b[name]) for a, b in pairs for name in COMPARED)


def measure(
    kind: str, pairs: list[tuple[Topology, Topology]], folder: Path, steps: int
) -> dict[tuple[Topology, Topology], float]:
    """The difference of every pair, one kind of run."""
    config, found = make_run(folder, top_k=2), {}
    for before in sorted({before for before, _ in pairs}):
        whole = folder / "{}-{}".format(*before)
        uninterrupted = go_on(config, whole, SETTINGS[kind], before, steps)
        shutil.rmtree(whole / "checkpoints" / f"step-{steps:06d}")
        for after in sorted(after for first, after in pairs if first == before):
            run_dir = folder / "resumed"
            shutil.copytree(whole, run_dir)
            resumed = go_on(config, run_dir, SETTINGS[kind], after, steps)
            found[before, after] = difference(resumed, uninterrupted, steps)
            print(f"{kind} {before} -> {after}: {found[before, after]:.1e}", flush=True)
            shutil.rmtree(run_dir)
    return found


def table(kind: str, found: dict[tuple[Topology, Topology], float]) -> str:
    """Markdown: a row for each topology before, a column for each after."""
    lines = [f"| {kind}: from, to | {' | '.join(map(str, TOPOLOGIES))} |", "|---" * (len(TOPOLOGIES) + 1) + "|"]
    for before in TOPOLOGIES:
        cells = [f"{found[before, after]:.1e}" if (before, after) in found else "" for after in TOPOLOGIES]
        lines.append(f"| {before} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Measure; 1 when any pair differs by more than the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="of a run (20)")
    parser.add_argument("--pairs", type=int, metavar="N", help="draw N of the 16 pairs (all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    args = parser.parse_args(argv)
    draw, everything = random.Random(args.seed), [(a, b) for a in TOPOLOGIES for b in TOPOLOGIES]
    tables, worst = [], 0.0
    for kind in args.kinds:
        pairs = everything if args.pairs is None else draw.sample(everything, args.pairs)
        with tempfile.TemporaryDirectory() as folder:
            found = measure(kind, pairs, Path(folder), args.steps)
        tables.append(table(kind, found))
        worst = max(worst, *found.values())
    print("\n\n".join(tables))
    print(f"\nlargest relative difference {worst:.1e}, {TOLERANCE:.0e} allowed")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
