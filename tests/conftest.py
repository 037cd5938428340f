"""What tests share: a tiny checkpoint, puzzles, and a run config over them."""

import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads fight over two cores

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a script started the suite with `&`; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

from tests.forks import SHARED, share
from tests.training import make_run

# The files that take longest come first: a process that begins with one of them at the end leaves the other idle.
FIRST = [
    "engine/test_offload.py",
    "test_gpu_rehearsal.py",
    "test_benchmarks.py",
    "test_readme.py",
    "test_parity.py",
    "test_resume.py",
    "test_hostfile.py",
    "evaluation/test_learned.py",
    "test_faults.py",
    "test_stop.py",
    "engine/test_topologies.py",
    "plan/test_plan.py",
]


def pytest_configure(config: pytest.Config) -> None:
    """One server of forks for all of xdist's workers."""
    if SHARED not in os.environ and config.getoption("numprocesses", None):
        share()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort FIRST to the front; `tests/run.sh` has xdist keep this order."""
    place = {config.rootpath / "tests" / name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(FIRST)))


@pytest.fixture(scope="session")
def sudoku_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run config (fp32, ZeRO-3, one rank) with its tiny model and 64 puzzles; tests override run.dir.

    Every token goes to all experts: a choice is discrete, a near tie swaps by rounding, and the loss jumps.
    """
    return make_run(tmp_path_factory.mktemp("sudoku"), top_k=8)
