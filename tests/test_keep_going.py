"""The restart loop: what it tries again, what it does not, how it stops; and that nothing of a job is left behind."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.training import REPOSITORY

# A launcher with a rank and a worker of it, as the loop sees them: `train(try)` says what the rank does.
PROGRAM = """
import os, shutil, signal, subprocess, sys, time, json
from pathlib import Path
run, case = Path(sys.argv[1]), sys.argv[2]
def checkpoint(step): (run / f"checkpoints/step-{{step:06d}}").mkdir(parents=True, exist_ok=True)
def complete(step=20):
    config = Path(sys.argv[sys.argv.index("--config") + 1]).read_text()
    (run / "config.yaml").write_text(config.replace("max_steps: 20", f"max_steps: {{step}}"))
    (run / "complete.json").write_text(json.dumps({{"step": step}}))
    checkpoint(step)
def rank():
    signal.signal(signal.SIGTERM, lambda *_: open(run / "asked", "a").write("x"))
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    (run / "pids").write_text(f"{{os.getpid()}} {{worker.pid}}")
    while not ("polite" in case and (run / "asked").exists()): time.sleep(0.05)
    time.sleep(0.3)
    worker.kill()
if case.startswith("rank"):
    rank()
    sys.exit(75)
tries = len(list(run.glob("try-*"))) + 1
run.mkdir(parents=True, exist_ok=True)
(run / f"try-{{tries}}").touch()
{body}
"""
LAUNCH = """
kind = "rank " + ("polite" if "polite" in case else "deaf")
child = subprocess.Popen([sys.executable, __file__, str(run), kind], env=dict(os.environ, RANK="0"))
sys.exit(child.wait())
"""


def keep_going(config: Path, tmp_path: Path, case: str, body: str, *options: str) -> tuple[list[str], Path]:
    """The loop's command around a program of ours, and its run directory."""
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "program.py").write_text(PROGRAM.format(body=body))
    training = [sys.executable, str(tmp_path / "program.py"), str(run), case]
    overrides = ["--config", str(config), "--set", f"run.dir={run}"]
    loop = [sys.executable, "-m", "ds_dgemma.launch.keep_going", "--wait", "0.01", *options]
    return [*loop, *training, *overrides], run


@pytest.mark.parametrize(
    ("body", "code", "tries", "said"),
    [
        ("complete()", 0, 1, "complete at step 20"),
        ("complete() if tries == 3 else os.kill(os.getpid(), 9)", 0, 3, "complete at step 20"),
        ("sys.exit(0)", 1, 3, "Given up: 3 tries without a new one"),  # an exit code proves nothing
        ("sys.exit(4)", 4, 3, "exit code 4 and is not complete"),
        ("checkpoint(tries) if tries < 4 else None; sys.exit(1)", 1, 5, "newest checkpoint: step 3. Given up: 3 tries"),
        ("sys.exit(2 if tries == 2 else 1)", 2, 2, "a mistake that a new start would repeat"),
        ("sys.exit(5)", 5, 1, "numbers gone bad"),
        ("sys.exit(75)", 75, 1, "asked to stop"),
        ("complete(); sys.exit(1)", 0, 1, "complete at step 20"),
        ("complete(30)", 1, 3, "newest checkpoint: step 30. Given up: 3 tries"),  # another run's, a longer one
        ("complete(); shutil.rmtree(run / 'checkpoints')", 1, 3, "newest checkpoint: step 0. Given up: 3 tries"),
    ],
)
def test_what_is_tried_again(body, code, tries, said, sudoku_run: Path, tmp_path: Path) -> None:
    command, run = keep_going(sudoku_run, tmp_path, "train", body, "--tries", "3")
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert len(list(run.glob("try-*"))) == tries
    assert all(line.startswith("keep_going: ") for line in done.stderr.splitlines())


def test_a_command_that_cannot_be_kept_going_is_refused(sudoku_run: Path, tmp_path: Path) -> None:
    def told(*command: str) -> str:
        loop = [sys.executable, "-m", "ds_dgemma.launch.keep_going", *command]
        done = subprocess.run(loop, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "a training with its --config" in told("deepspeed", "--module", "ds_dgemma.train")
    assert "nosuch: no such command" in told("nosuch", "--config", str(sudoku_run))
    assert "are kept by launch/multinode.sh" in told("deepspeed", "--hostfile", "H", "--config", str(sudoku_run))
    assert "train.max_stops" in told("deepspeed", "--config", str(sudoku_run), "--set", "train.max_stops=1")
    script = tmp_path / "script"
    script.write_text("deepspeed")
    script.chmod(0o755)
    run = ["--config", str(sudoku_run), "--set", f"run.dir={tmp_path / 'run'}"]
    assert f"Exec format error: '{script}'" in told(str(script), *run)
    assert "hosts cannot be read" in told("bash", "launch/multinode.sh", "--hostfile", str(tmp_path / "hosts"), *run)
    for resume in ("never", tmp_path / "run/checkpoints/step-000010"):
        said = told("deepspeed", *run, "--set", f"run.resume={resume}")
        assert said.startswith(f"run.resume = {resume}  would stop at the second try. Set run.resume: auto")
    for wait in ("nan", "-1", "1e12"):
        said = told("--wait", wait, "deepspeed", *run)
        assert "--wait, --longest-wait: expected seconds, 0 to 604,800" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_reaches_the_ranks_once_and_the_loop_waits_for_them(name, sudoku_run: Path, tmp_path: Path) -> None:
    command, run = keep_going(sudoku_run, tmp_path, "polite", LAUNCH)
    loop, processes = started(command, run)
    loop.send_signal(getattr(signal, name))
    _, said = loop.communicate(timeout=240)
    assert loop.returncode == 75, said
    assert (run / "asked").read_text() == "x"  # the rank, once; neither its worker nor its launcher
    assert f"stopped by {name}" in said
    assert len(list(run.glob("try-*"))) == 1
    assert gone(processes)


@pytest.mark.slow
def test_a_second_signal_ends_the_job_at_once(sudoku_run: Path, tmp_path: Path) -> None:
    command, run = keep_going(sudoku_run, tmp_path, "deaf", LAUNCH)
    loop, processes = started(command, run)
    loop.terminate()
    time.sleep(1)
    assert loop.poll() is None
    loop.send_signal(signal.SIGINT)
    _, said = loop.communicate(timeout=240)
    assert loop.returncode == 128 + signal.SIGINT, said
    assert gone(processes)


@pytest.mark.slow
def test_ranks_are_stopped_when_the_loop_is_killed(sudoku_run: Path, tmp_path: Path) -> None:
    command, run = keep_going(sudoku_run, tmp_path, "polite", LAUNCH)
    loop, processes = started(command, run)
    loop.kill()
    loop.communicate()
    assert gone(processes)
    assert (run / "asked").read_text() == "x"  # they could write a checkpoint


def started(command: list[str], run: Path) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """The loop, and all processes of its job once a rank has begun."""
    loop = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (run / "pids").exists() or not (run / "pids").read_text():
        assert loop.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks = [psutil.Process(int(pid)) for pid in (run / "pids").read_text().split()]
    return loop, [*ranks, *filter(None, [ranks[0].parent()])]


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=120)
    return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
