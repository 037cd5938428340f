"""The GPU script holds on the CPU at miniature shapes, so that a GPU needs no more than its one command."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.gpu.report import Check, run

SCRIPT = Path(__file__).parent / "gpu.sh"


def test_a_check_that_hangs_is_ended_with_its_children_and_is_a_row_like_one_that_fails() -> None:
    start_child = (
        "import subprocess, sys; child = subprocess.Popen(['sleep', '60']); print('FIGURE', child.pid, flush=True)"
    )
    hangs = run(Check("hangs", ["-c", f"{start_child}; child.wait()"], limit=2), seconds_left=60)
    assert hangs.result == "FAILED (over 2 s)"
    time.sleep(0.2)
    pid = int(hangs.figure)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert run(Check("fails", ["-c", "raise SystemExit(1)"], limit=30), seconds_left=60).result == "FAILED (1)"
    assert run(Check("late", ["-c", "pass"], limit=30), seconds_left=0).result == "NOT RUN"


@pytest.mark.slow
def test_gpu_checks_hold_in_rehearsal_and_are_rows_of_the_table(tmp_path: Path) -> None:
    """All but parity in fp32 and with adapters, which `test_parity.py` has in the same way, and Sudoku through
    `deepspeed`, as `test_readme.py` runs it.
    """
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix}  # this one, also in a worktree without its own
    only = "^parity, bf16|expert layer|fake|kernels|sampler|step"
    command = ["bash", SCRIPT, "--rehearse", "--out", tmp_path, "--only", only]
    script = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert script.returncode == 0, script.stdout + script.stderr
    (table,) = tmp_path.glob("rehearsal-*.md")
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.*) \| \d+ \|$", table.read_text(), re.MULTILINE)
    assert len(rows) == 7
    assert {result for _, result, _ in rows} == {"ok"}
    without = [name for name, _, figure in rows if not figure]
    assert without == ["parity cases by unmodified transformers"]
