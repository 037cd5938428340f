"""A rank does not outlive its launcher, whichever of DeepSpeed's processes was killed, and when."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

RANK = (
    "import time; from ds_dgemma.engine.launcher_watch import watch_launcher; {wait}; watch_launcher(); time.sleep(60)"
)
# Each level starts the next, tells its process number, and waits; its arguments look like a launcher's.
LEVEL = "import subprocess, sys; c = subprocess.Popen(sys.argv[2:]); print(c.pid, flush=True); c.wait()"


def start(wait: str) -> tuple[subprocess.Popen, psutil.Process]:
    """`deepspeed` -> `deepspeed.launcher.launch` -> rank; return the first and the last."""
    rank = [sys.executable, "-c", RANK.format(wait=wait)]
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


def ended(process: psutil.Process) -> bool:
    try:
        process.wait(20)
    except psutil.TimeoutExpired:
        process.kill()
        return False
    return True


@pytest.mark.parametrize("wait", ["pass", "time.sleep(3)"], ids=["while it trains", "while it imports"])
def test_a_rank_ends_when_deepspeed_is_killed(wait: str) -> None:
    runner, rank = start(wait)
    time.sleep(2)
    launch = rank.parent()
    assert launch is not None
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    assert ended(rank)
    launch.wait(20)


def test_a_rank_ends_when_the_launcher_of_its_node_is_killed() -> None:
    runner, rank = start("pass")
    time.sleep(2)
    launch = rank.parent()
    assert launch is not None
    launch.kill()
    assert ended(rank)
    runner.wait(20)


def test_a_process_without_a_launcher_is_left_alone() -> None:
    code = "from ds_dgemma.engine.launcher_watch import watch_launcher; watch_launcher(); import time; time.sleep(2)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2]).returncode == 0
