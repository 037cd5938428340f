"""The four losses at equal steps: 4x4 Sudoku from random weights, the share solved and the base loss of each.

    python -m tests.benchmarks.losses --dir runs/losses [--seeds 0 1 2] [--steps 900] [--set objective.noise_max=0.9]

`ds_configs/runs/sudoku.yaml` but for `objective.loss` and the seed, which is that of weights, data order and
noise; one process for a run. The export answers held-out puzzles. The four minimise different quantities, so all are
measured by the same two, on the same puzzles, at the same noise and coins:

- base loss: the cross-entropy of softmax(f), which is what the sampler draws from;
- posterior loss: the same for base and reweighted; of the others with the shift they were trained with, unweighted.
  Without it they do not say what the token itself tells, so only this is a fair comparison of what was learned.

The table has medians over the seeds, least and most in brackets.

A run that is done is not done again, and one that was stopped goes on: give the same --dir.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import get_args

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from ds_dgemma.checkpoint.export import export_run
from ds_dgemma.checkpoint.load import check_places, materialise, plain
from ds_dgemma.checkpoint.pretrained import open_pretrained
from ds_dgemma.checkpoint.weights import WeightReader
from ds_dgemma.config.file import load_config
from ds_dgemma.config.run import LossName, ObjectiveSection
from ds_dgemma.data.split import read_split
from ds_dgemma.data.sudoku import write_sudoku
from ds_dgemma.evaluation.evaluate import evaluate
from ds_dgemma.evaluation.open_model import Source, find_model
from ds_dgemma.evaluation.questions import section_of
from ds_dgemma.evaluation.validation import FIXED_EPOCH
from ds_dgemma.model.build import build_stack
from ds_dgemma.model.names import places_of
from ds_dgemma.objective.collate import collate
from ds_dgemma.objective.corruption import Corruption
from ds_dgemma.objective.denoising import DenoisingObjective, TokenWeights
from ds_dgemma.ranks.layout import free_port
from ds_dgemma.tools.tiny import make_tiny

ROOT = Path(__file__).resolve().parents[2]
TRAIN_PUZZLES = 40_000
BATCH = 50
COLUMNS = ("solved", "cells", "stopped", "steps a canvas", "base loss", "posterior loss")
MANNER = ("stopped", "steps_per_canvas")
FORMS = (".1%", ".1%", ".1%", ".1f", ".3f", ".3f")


def make_data(folder: Path, puzzles: int) -> None:
    """The demo's puzzles; a file that is there is kept."""
    for split, count in (("train", TRAIN_PUZZLES), ("test", puzzles)):
        if not (file := folder / f"{split}.jsonl").is_file():
            write_sudoku(4, split, count, 0, file)


def train(folder: Path, loss: str, seed: int, args: argparse.Namespace) -> None:
    """Train from random weights of that seed, or go on; what it prints is in `train.log`."""
    if not (folder / "model").is_dir():
        make_tiny("sudoku4", folder / "model", seed=seed)
    settings = {
        "run.dir": folder / "run",
        "model.path": folder / "model",
        "data.train": args.dir / "train.jsonl",
        "seed": seed,
        "train.max_steps": args.steps,
        "train.micro_batch_size": 64,
        "optimizer.warmup_steps": min(100, args.steps // 2),
        "parallel.expert_parallel_size": 1,
        "objective.loss": loss,
    }
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", str(free_port())]
    command += ["--module", "ds_dgemma.train", "--config", "ds_configs/runs/sudoku.yaml"]
    for setting in (*(f"{key}={value}" for key, value in settings.items()), *args.set):
        command += ["--set", setting]
    with (folder / "train.log").open("ab") as log:
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        sys.exit(f"exit code {code}: {folder / 'train.log'}")


@torch.no_grad()
def diffusion_loss(model: Path, data: Path, loss: LossName) -> float:
    """Mean over the canvases' tokens, at levels, noise and coins that are every model's."""
    opened = open_pretrained(str(model))
    stack, reader = build_stack(opened.spec), WeightReader(model)
    materialise(stack, reader, check_places(stack, places_of(stack), reader), plain(torch.float32, "cpu"), device="cpu")
    objective = DenoisingObjective(stack, 16, loss).eval()
    config = load_config(ROOT / "ds_configs/runs/sudoku.yaml", [f"data.train={data}"])
    examples = read_split(config, "train", opened.spec, opened.tokenizer)
    corruption = Corruption(ObjectiveSection(), 0, opened.text.vocab_size)
    nll, tokens = 0.0, 0
    for start in range(0, len(examples), BATCH):
        rows = range(start, min(start + BATCH, len(examples)))
        batch = collate(corruption, [(examples[row], FIXED_EPOCH) for row in rows])
        nll += float(objective(batch, TokenWeights(1.0, 1.0)).diffusion_nll)
        tokens += batch.counts()[0]
    return nll / tokens


def measure(loss: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Train, export, answer; what came of it, kept in `result.json`."""
    folder = args.dir / f"{loss}-{seed}"
    folder.mkdir(exist_ok=True)
    result = folder / "result.json"
    if not result.is_file():
        train(folder, loss, seed, args)
        if not (folder / "export").is_dir():
            export_run(folder / "run", folder / "export", args.steps)
        test = args.dir / "test.jsonl"
        found = find_model(Source(str(folder / "export")), {})
        report = evaluate(found, section_of(str(test), {}), "sudoku", batch_size=BATCH, limit=None, seed=0)
        posterior: LossName = "leave_one_out" if "leave_one_out" in loss else "base"
        losses = [diffusion_loss(folder / "export", test, one) for one in ("base", posterior)]
        figures = (report["solved"], report["cells"], *(report["manner"][name] for name in MANNER), *losses)
        result.write_text(json.dumps(dict(zip(COLUMNS, figures, strict=True))))
    return json.loads(result.read_text())


def spread(values: list[float], form: str) -> str:
    """Median, least and most."""
    middle, *ends = (format(value, form) for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({ends[0]} to {ends[1]})" if len(values) > 1 else middle


def main(argv: list[str]) -> int:
    """Measure every loss at every seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="where runs and results are kept")
    parser.add_argument("--losses", nargs="+", choices=get_args(LossName), default=get_args(LossName))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--puzzles", type=int, default=200, help="held out")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", help="of every run")
    args = parser.parse_args(argv)
    args.dir = args.dir.resolve()
    args.dir.mkdir(parents=True, exist_ok=True)
    make_data(args.dir, args.puzzles)
    results: dict[str, list[dict[str, float]]] = {loss: [] for loss in args.losses}
    for seed in args.seeds:  # all losses of a seed first: a table of what is there can be read early
        for loss in args.losses:
            results[loss].append(measure(loss, seed, args))
            print(f"{loss}, seed {seed}: {results[loss][-1]}", file=sys.stderr, flush=True)
    print(f"| loss, {args.steps} steps, seeds {' '.join(map(str, args.seeds))} | {' | '.join(COLUMNS)} |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for loss, seen in results.items():
        cells = [spread([one[name] for one in seen], form) for name, form in zip(COLUMNS, FORMS, strict=True)]
        print(f"| {loss} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
