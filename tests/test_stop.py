"""A run that a signal stops: all ranks at the same step, with a checkpoint; the same command continues bit for bit."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from ds_dgemma.errors import EXIT_STOPPED
from ds_dgemma.ranks.layout import free_port
from tests.test_resume import final_state, numbers, wait_for_step
from tests.training import REPOSITORY, read_metrics, start_ranks, train

pytestmark = pytest.mark.slow

RUN = ["train.max_steps=10", "train.micro_batch_size=2", "optimizer.warmup_steps=4", "optimizer.lr=2e-3"]
SLOWED = ("tests.engine.slowed", "0.3")  # ten steps take no time


def test_a_stopped_run_continues_bit_for_bit_and_is_complete_at_its_last_step(sudoku_run, tmp_path):
    run_dir, log = tmp_path / "stopped", tmp_path / "stopped.log"
    stop_the_group_of_a_launcher(sudoku_run, run_dir, log)
    first = stopped_at(run_dir)
    assert "stopped after step" in log.read_text()

    ranks = start_ranks(sudoku_run, [f"run.dir={run_dir}", *RUN, "data.workers=1"], 2, log, SLOWED)
    wait_for_step(run_dir, first + 2, ranks)
    for child in psutil.Process(ranks[1].pid).children(recursive=True):
        child.terminate()  # as DeepSpeed's launcher does; the rank still needs its data workers
    ranks[1].send_signal(signal.SIGUSR1)
    assert [rank.wait(240) for rank in ranks] == [EXIT_STOPPED] * 2, log.read_text()
    second = stopped_at(run_dir)
    assert second > first
    assert f"stopped after step {second} by SIGUSR1 (rank 1): {run_dir}/checkpoints" in log.read_text()

    undisturbed = train(sudoku_run, tmp_path / "undisturbed", RUN, processes=2)
    assert numbers(train(sudoku_run, run_dir, RUN, processes=2)) == numbers(undisturbed)
    assert final_state(run_dir) == final_state(tmp_path / "undisturbed")
    assert json.loads((run_dir / "complete.json").read_text()) == {"step": 10}


def stop_the_group_of_a_launcher(config: Path, run_dir: Path, log: Path) -> None:
    """Start DeepSpeed's launcher and end its process group as Slurm or a closed terminal would; nobody is left."""
    overrides = [argument for override in [f"run.dir={run_dir}", *RUN] for argument in ("--set", override)]
    program = [*SLOWED, "--config", str(config), *overrides]
    launcher = ["--num_gpus", "2", "--master_port", str(free_port()), "--no_local_rank", "--module"]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *launcher, *program]
    environment = dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    with log.open("ab") as output:
        runner = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_for_step(run_dir, 2, [runner])
        everyone = psutil.Process(runner.pid).children(recursive=True)
        os.killpg(runner.pid, signal.SIGTERM)
        runner.wait(240)
        _, left = psutil.wait_procs(everyone, 240)
        assert not left, f"{left}\n{log.read_text()}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(runner.pid, signal.SIGKILL)


def stopped_at(run_dir: Path) -> int:
    """The step of the last record, of which there must be a checkpoint and no claim to be complete."""
    step = read_metrics(run_dir)[-1]["step"]
    assert 0 < step < 10
    assert (run_dir / "checkpoints" / f"step-{step:06d}" / "state.json").exists()
    assert not (run_dir / "complete.json").exists()
    return step
