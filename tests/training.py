"""Start real training runs from tests: one process per rank, the environment that a launcher would set."""

import json
import os
from pathlib import Path

from ds_dgemma.data.sudoku import write_sudoku
from ds_dgemma.ranks.layout import free_port
from ds_dgemma.tools.tiny import make_tiny
from tests.forks import REPOSITORY, Process, start

RUN = """
run: {{dir: {folder}/run}}
model: {{path: {folder}/model}}
data: {{train: {folder}/train.jsonl, workers: 0}}
train: {{max_steps: 20, global_batch_size: 8, micro_batch_size: 8, precision: fp32}}
optimizer: {{lr: 1.5e-4, min_lr: 1.5e-5, warmup_steps: 25}}
checkpoint: {{every: 0}}
deepspeed: {repository}/ds_configs/zero3.json
"""


def make_run(folder: Path, top_k: int) -> Path:
    """A run config (fp32, ZeRO-3, one rank) with a tiny model, `top_k` of 8 experts for a token, and 64 puzzles."""
    make_tiny("sudoku4", folder / "model")
    config = json.loads((folder / "model/config.json").read_text())
    config["text_config"]["top_k_experts"] = top_k
    (folder / "model/config.json").write_text(json.dumps(config))
    write_sudoku(4, "train", 64, 1, folder / "train.jsonl")
    (folder / "run.yaml").write_text(RUN.format(folder=folder, repository=REPOSITORY))
    return folder / "run.yaml"


def start_ranks(
    config: Path, overrides: list[str], processes: int, log: Path, program: tuple[str, ...] = ("ds_dgemma.train",)
) -> list[Process]:
    """Start `processes` ranks of a module that trains (and its own arguments); all of them write to `log`."""
    arguments = [argument for override in overrides for argument in ("--set", override)]
    return start_module([*program, "--config", str(config), *arguments], processes, log)


def start_module(arguments: list[str], processes: int, log: Path) -> list[Process]:
    """Start `processes` ranks of a module with its arguments; all of them write to `log`."""
    shared = dict(
        os.environ,
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
        WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes),
    )
    with log.open("ab") as output:
        return [
            start(arguments, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, output)
            for rank in range(processes)
        ]


def train(
    config: Path,
    run_dir: Path,
    overrides: list[str],
    processes: int = 1,
    timeout: float = 600,
    program: tuple[str, ...] = ("ds_dgemma.train",),
    ends_with: int = 0,
) -> list[dict]:
    """Train until the ranks end and return the run's metrics; fails the test with the log when one ends otherwise."""
    log = run_dir.with_suffix(".log")
    ranks = start_ranks(config, [f"run.dir={run_dir}", *overrides], processes, log, program)
    try:
        codes = [rank.wait(timeout) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [ends_with] * processes, f"exit codes {codes}\n{log.read_text()[-4000:]}"
    return read_metrics(run_dir)


def read_metrics(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The records of every step."""
    records = map(json.loads, (run_dir / name).read_text().splitlines())
    return [record for record in records if "kind" not in record]
