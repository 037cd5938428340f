"""Start real training runs from tests: one process per rank, the environment that a launcher would set."""

import json
import os
import subprocess
import sys
from pathlib import Path

from ds_dgemma.engine.ranks import free_port

REPOSITORY = Path(__file__).resolve().parent.parent


def start_ranks(
    config: Path, overrides: list[str], processes: int, log: Path, program: tuple[str, ...] = ("ds_dgemma.train",)
) -> list[subprocess.Popen]:
    """Start `processes` ranks of a module that trains (and its own arguments); all of them write to `log`."""
    arguments = [argument for override in overrides for argument in ("--set", override)]
    return start_module([*program, "--config", str(config), *arguments], processes, log)


def start_module(arguments: list[str], processes: int, log: Path) -> list[subprocess.Popen]:
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
    command = [sys.executable, "-m", *arguments]
    with log.open("ab") as output:
        return [
            subprocess.Popen(
                command,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
            )
            for rank in range(processes)
        ]


def train(
    config: Path,
    run_dir: Path,
    overrides: list[str],
    processes: int = 1,
    timeout: float = 300,
    program: tuple[str, ...] = ("ds_dgemma.train",),
) -> list[dict]:
    """Train to the end and return the run's metrics; fails the test with the log when any rank fails."""
    log = run_dir.with_suffix(".log")
    ranks = start_ranks(config, [f"run.dir={run_dir}", *overrides], processes, log, program)
    try:
        codes = [rank.wait(timeout) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * processes, f"exit codes {codes}\n{log.read_text()[-4000:]}"
    return read_metrics(run_dir)


def read_metrics(run_dir: Path) -> list[dict]:
    """The records of every step."""
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if "kind" not in record]
