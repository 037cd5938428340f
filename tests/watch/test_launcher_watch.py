"""A rank does not outlive its launcher, whichever of DeepSpeed's processes was killed, and when."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

WATCH = """
import os, time
from pathlib import Path
from ds_dgemma.ranks.stop_request import StopRequest
stop = StopRequest()
"""
IMPORTING = "time.sleep(3); "  # takes its time, and finds its launcher gone
LOADING = "stop.watch_launcher(); print('ready', flush=True); time.sleep(60)"
TRAINING = """
stop.step = 1
stop.watch_launcher()
print("ready", flush=True)
while stop.reason is None:
    time.sleep(0.05)
time.sleep(1.5)
Path("{saved}").touch()
os._exit(0)
"""
# Each level starts the next, tells its process number, and waits; its arguments look like a launcher's.
LEVEL = "import subprocess, sys; c = subprocess.Popen(sys.argv[2:]); print(c.pid, flush=True); c.wait()"


def start(program: str) -> tuple[subprocess.Popen, psutil.Process]:
    """`deepspeed` -> `deepspeed.launcher.launch` -> rank; return the first and the last."""
    rank = [sys.executable, "-c", WATCH + program]
    launch = [sys.executable, "-c", LEVEL, "deepspeed.launcher.launch", *rank]
    runner = subprocess.Popen(
        [sys.executable, "-c", LEVEL, "bin/deepspeed", *launch],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert runner.stdout is not None
    runner.stdout.readline()
    return runner, psutil.Process(int(runner.stdout.readline()))


def wait_until_ready(runner: subprocess.Popen) -> None:
    assert runner.stdout is not None
    assert runner.stdout.readline() == "ready\n"


def ended(process: psutil.Process) -> bool:
    try:
        process.wait(60)
    except psutil.TimeoutExpired:
        process.kill()
        return False
    return True


@pytest.mark.parametrize("program", [LOADING, IMPORTING + LOADING], ids=["while it loads", "while it imports"])
def test_a_rank_ends_when_deepspeed_is_killed(program: str) -> None:
    runner, rank = start(program)
    if program is LOADING:
        wait_until_ready(runner)
    launch = rank.parent()
    assert launch is not None
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    assert ended(rank)
    launch.wait(60)


def test_a_rank_ends_when_the_launcher_of_its_node_is_killed() -> None:
    runner, rank = start(LOADING)
    wait_until_ready(runner)
    launch = rank.parent()
    assert launch is not None
    launch.kill()
    assert ended(rank)
    runner.wait(60)


def test_a_rank_that_trains_has_time_for_a_checkpoint_when_deepspeed_is_killed(tmp_path: Path) -> None:
    runner, rank = start(TRAINING.format(saved=tmp_path / "saved"))
    wait_until_ready(runner)
    runner.terminate()
    runner.wait()
    assert ended(rank)
    assert (tmp_path / "saved").exists()


def test_a_process_without_a_launcher_is_left_alone() -> None:
    code = WATCH + "stop.watch_launcher(); time.sleep(2)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2]).returncode == 0
