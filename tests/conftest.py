"""What tests share: a tiny checkpoint, puzzles, and a run config over them."""

import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads fight over two cores

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a script started the suite with `&`; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

from tests.training import make_run


@pytest.fixture(scope="session")
def sudoku_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run config (fp32, ZeRO-3, one rank) with its tiny model and 64 puzzles; tests override run.dir.

    Every token goes to all experts: a choice is discrete, a near tie swaps by rounding, and the loss jumps.
    """
    return make_run(tmp_path_factory.mktemp("sudoku"), top_k=8)
