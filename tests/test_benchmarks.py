"""The micro-benchmark runs, and compares equal work."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

STEP = Path(__file__).parent / "benchmarks" / "step.py"


@pytest.mark.slow
def test_a_benchmark_step_computes_what_transformers_does_and_prints_the_ratios() -> None:
    small = ["--prompt", "16", "--response", "64", "--batch", "2", "--vocabulary", "512", "--repeats", "1"]
    run = subprocess.run([sys.executable, STEP, *small, "--steps", "1"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr  # 1 when the losses differ
    ratios = re.findall(r"/ transformers: CPU time (\S+), wall time (\S+), peak memory (\S+)", run.stdout)
    assert len(ratios) == 2  # recomputed, and kept
    assert all(float(ratio) > 0 for variant in ratios for ratio in variant)
