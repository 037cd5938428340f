"""Run every check that needs a GPU, each as a process with a time limit, and write one dated table.

`tests/gpu.sh` starts this. A check prints its figures on lines that begin with FIGURE and exits with 0 when it holds;
one that fails or takes too long does not stop the others. To add a check, add a line to `stages`.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import repeat
from pathlib import Path

import torch

from tests.gpu import ROOT

BUDGET = 550  # seconds for all checks
CASES = {"parity cases": "parity, ", "adapters on them": "LoRA parity, "}  # and the names of the checks that read them
PATIENCE = 10  # times longer may a rehearsal take, on whatever CPU: it is about what holds, not about time


@dataclass(frozen=True)
class Check:
    """A command that holds or not; its limit is in seconds."""

    name: str
    command: list[str]
    limit: float


@dataclass(frozen=True)
class Row:
    """What came of a check."""

    name: str
    result: str
    figure: str
    seconds: float


def stages(cases: str, rehearse: bool) -> list[list[Check]]:
    """All checks in order; those of a stage run at once, so what is timed has a stage of its own."""
    few, small, one_layer = (["--case", "base"], ["--rehearse"], ["--layers", "1"]) if rehearse else ([], [], [])
    parity, bf16 = ["-m", "tests.gpu.parity", cases, "--dtype"], "bfloat16"
    return [
        [
            Check("parity cases by unmodified transformers", ["tests/reference/fixtures.py", cases, *few], 60),
            Check("layers at real shapes on fake devices, bf16", ["-m", "tests.gpu.fake"], 60),
        ],
        [Check("adapters on them by unmodified PEFT", ["tests/reference/lora.py", cases], 60)],
        [
            Check("parity, fp32, ZeRO-3", [*parity, "float32"], 120),
            Check("parity, bf16, grouped matmul", [*parity, bf16, "--grouped"], 120),
            Check("LoRA parity, fp32, ZeRO-3", [*parity, "float32", "--lora"], 120),
            Check("LoRA parity, bf16, grouped matmul", [*parity, bf16, "--grouped", "--lora"], 120),
            Check("Sudoku through `deepspeed`, Muon, bf16, ZeRO-3, EP 1", ["-m", "tests.gpu.sudoku", *small], 120),
        ],
        [Check("expert layer, grouped matmul on and off, bf16", ["-m", "tests.gpu.grouped", *small], 60)],
        [Check("attention kernels, bf16", ["-m", "tests.gpu.attention", *small], 90)],
        [Check("sampler beside generate()", ["-m", "tests.gpu.sampler", *small], 90)],
        [Check("step at real shapes, bf16, ZeRO-3", ["-m", "tests.gpu.real_shapes", *one_layer, *small], 160)],
        [Check("LoRA on all 30 layers, bf16, ZeRO-3", ["-m", "tests.gpu.whole_model", *small], 300)],
    ]


def chosen(everything: list[list[Check]], only: str) -> list[list[Check]]:
    """The checks whose name has the regular expression, and the cases that they read."""
    wanted = {check.name for stage in everything for check in stage if re.search(only, check.name)}
    needed = tuple(cases for cases, reader in CASES.items() if any(reader in name for name in wanted))
    return [[check for check in stage if check.name in wanted or check.name.startswith(needed)] for stage in everything]


def run(check: Check, seconds_left: float) -> Row:
    """Run one check to its end or its limit; its output goes to the terminal when it does not hold."""
    limit = min(check.limit, seconds_left)
    if seconds_left < 10:
        return Row(check.name, "NOT RUN", f"the {BUDGET} s of all checks are over", 0)
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, *check.command],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its children can be ended with it
        )
        try:
            code = process.wait(limit)
            result = "ok" if code == 0 else f"FAILED ({code})"
        except subprocess.TimeoutExpired:
            result = f"FAILED (over {limit:.0f} s)"
        finally:
            end_group(process)
        log.seek(0)
        lines = log.read().splitlines()
    figures = [line.removeprefix("FIGURE ") for line in lines if line.startswith("FIGURE ")]
    if result != "ok":
        print("\n".join(f"    {line}" for line in lines[-40:]))
    return Row(check.name, result, "; ".join(figures), time.monotonic() - began)


def end_group(process: subprocess.Popen) -> None:
    """End a check with all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def output_of(*command: str) -> str:
    """First line that a program prints, empty when it cannot."""
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip().split("\n")[0] if run.returncode == 0 else ""


def machine(rehearse: bool) -> str:
    """What the checks ran on and what they checked."""
    commit = os.environ.get("COMMIT") or output_of("git", "rev-parse", "--short", "HEAD") or "unknown"
    changed = ", with changes" if output_of("git", "status", "--porcelain", "--untracked-files=no") else ""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    if rehearse:
        return f"Rehearsal on the CPU at miniature shapes, {packages}, commit {commit}{changed}."
    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / 2**30
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"
    return (
        f"{name}, {memory:.0f} GiB, driver {driver}, CUDA {torch.version.cuda}, {packages}, commit {commit}{changed}."
    )


def table(rows: list[Row], about: str, when: datetime) -> str:
    """The report as Markdown."""
    title = f"# GPU checks, {when:%Y-%m-%d %H:%M} UTC"
    head = [title, "", about, "", "| check | result | figure | seconds |", "|---|---|---|---|"]
    cells = [(row.name, row.result, row.figure.replace("|", "/"), f"{row.seconds:.0f}") for row in rows]
    return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in cells)]) + "\n"


def main() -> int:
    """Run all, print as they end, write the table; 1 when any does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", metavar="REGEX", default="", help="checks whose name has it, and the cases they need")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        print("No CUDA device. To try the script without one: bash tests/gpu.sh --rehearse", file=sys.stderr)
        return 2
    when, about = datetime.now(timezone.utc), machine(args.rehearse)
    print(about, flush=True)
    patience = PATIENCE if args.rehearse else 1
    deadline, rows = time.monotonic() + patience * BUDGET, []
    with tempfile.TemporaryDirectory() as cases:
        for stage in chosen(stages(cases, args.rehearse), args.only):
            patient = [replace(check, limit=patience * check.limit) for check in stage]
            with ThreadPoolExecutor(max(1, len(patient))) as together:
                for row in together.map(run, patient, repeat(deadline - time.monotonic())):
                    rows.append(row)
                    print(f"{row.result:<8} {row.name} ({row.seconds:.0f} s)  {row.figure}", flush=True)
    out = args.out or (None if args.rehearse else ROOT / "tests" / "benchmarks")
    if out:
        out.mkdir(parents=True, exist_ok=True)
        head = "rehearsal" if args.rehearse else "gpu"
        kind = "cpu" if args.rehearse else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
        file = out / f"{head}-{when:%Y-%m-%d}-{kind}.md"
        file.write_text(table(rows, about, when))
        print(f"wrote {file}")
    return int(any(row.result != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
