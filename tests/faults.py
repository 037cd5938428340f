"""Break runs on purpose and start the same command again: nothing may be lost, nothing may hang.

    python -m tests.faults --trials N [--seed S] [--kinds kill-rank full-disk ...]

A trial trains on two ranks (EP 2) under the `deepspeed` launcher, breaks the run at a random moment, waits until the
job has ended, and starts the same command again until the run is complete. Then

- every step's losses and the last checkpoint's files must equal those of an undisturbed run, bit for bit;
- the run must have gone on from the newest checkpoint that was whole when it broke (lost: it went on from less);
- the broken job must have ended within its bound, with no process left (hang: it had not, and was killed);
- complete.json must be there exactly when the run is complete.

`full-disk` needs to mount a tmpfs; where that is not allowed its trials are skipped, and said so. A moment that was
missed (the run was over, or no checkpoint was being written) is drawn again. Exit code 1 when anything failed.
"""

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.broken_job import Job, send
from tests.test_resume import final_state, numbers
from tests.training import make_run, read_metrics, train

STEPS, EVERY, RANKS = 10, 3, 2
TIMEOUT_MINUTES = 0.25  # of a collective
OVERRIDES = [
    f"train.max_steps={STEPS}",
    f"checkpoint.every={EVERY}",
    "train.micro_batch_size=4",
    "optimizer.warmup_steps=4",
    f"parallel.expert_parallel_size={RANKS}",
    f"parallel.collective_timeout_minutes={TIMEOUT_MINUTES}",
]
KILLED_BY_LAUNCHER = 30  # seconds after which DeepSpeed's launcher kills a rank that does not end
BOUND = 60 * TIMEOUT_MINUTES + KILLED_BY_LAUNCHER + 30  # seconds from the fault to the job's end
LONGEST = 600  # seconds of a whole run on a busy machine
TMPFS_BYTES = 64 * 2**20


class Missed(Exception):
    """The moment for a fault went by."""


def wait_until(job: Job, happened: Callable[[], bool]) -> None:
    """Return as soon as something holds.

    Raises:
        Missed: the job ended before.
    """
    while not happened():
        if job.launcher.poll() is not None:
            raise Missed
        time.sleep(0.001)


def random_moment(job: Job, draw: random.Random, first_step: int = 0) -> None:
    """A moment of the start, of a step, or between two; from `first_step` on."""
    if first_step == 0 and draw.random() < 0.2:
        wait_until(job, lambda: bool(job.launchers()))
        time.sleep(draw.uniform(0, 8))
    else:
        step = draw.randint(first_step, STEPS - 2)
        wait_until(job, lambda: job.step() >= step)
        time.sleep(draw.uniform(0, 0.3))


def victim(job: Job, draw: random.Random, processes: Callable[[], list[psutil.Process]]) -> psutil.Process:
    """A random one, once there are any."""
    wait_until(job, lambda: bool(processes()))
    return draw.choice(processes())


def kill_rank(job: Job, draw: random.Random) -> None:
    random_moment(job, draw)
    send(victim(job, draw, job.ranks), signal.SIGKILL)


def kill_launcher(job: Job, draw: random.Random) -> None:
    random_moment(job, draw)
    send(victim(job, draw, job.launchers), signal.SIGKILL)


def kill_all(job: Job, draw: random.Random) -> None:
    random_moment(job, draw)
    for process in job.processes():
        send(process, signal.SIGKILL)


def kill_in_a_write(job: Job, draw: random.Random) -> None:
    wait_until(job, lambda: bool(job.ranks()))
    ranks, launchers = job.ranks(), job.launchers()
    targets = draw.choice([[draw.choice(ranks)], [draw.choice(launchers)], ranks, ranks + launchers])
    step = draw.choice(range(EVERY, STEPS, EVERY))
    partial = job.run_dir / "checkpoints" / f"step-{step:06d}.partial"
    wait_until(job, lambda: partial.exists() or job.step() > step)
    time.sleep(draw.uniform(0, 0.02))
    if not partial.exists():
        raise Missed
    for process in targets:
        send(process, signal.SIGKILL)


def signal_storm(job: Job, draw: random.Random) -> None:
    random_moment(job, draw)
    for _ in range(draw.randint(1, 6)):
        processes = job.processes()
        if not processes:
            break
        send(draw.choice(processes), draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]))
        time.sleep(draw.choice([0, draw.uniform(0, 2)]))


def terminate_group(job: Job, draw: random.Random) -> None:
    random_moment(job, draw)
    os.killpg(job.launcher.pid, draw.choice([signal.SIGTERM, signal.SIGINT]))


def stop_rank(job: Job, draw: random.Random) -> None:
    random_moment(job, draw, first_step=1)
    send(victim(job, draw, job.ranks), signal.SIGSTOP)


def damage_newest(job: Job, draw: random.Random) -> None:
    """A power cut, and a newest checkpoint that came back truncated, or with a bit flipped."""
    random_moment(job, draw, first_step=2 * EVERY + 1)
    for process in job.processes():
        send(process, signal.SIGKILL)
    job.end(BOUND)
    file = draw.choice(sorted(path for path in checkpoints(job.run_dir)[-1].iterdir() if path.stat().st_size))
    content = bytearray(file.read_bytes())
    place = draw.randrange(len(content))
    if draw.random() < 0.5:
        del content[place:]
    else:
        content[place] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def fill_disk(job: Job, draw: random.Random) -> None:
    random_moment(job, draw)
    ballast = job.run_dir.parent / "ballast"
    with ballast.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(2**16))
        except OSError:
            pass


FAULTS = {
    "kill-rank": kill_rank,
    "kill-launcher": kill_launcher,
    "kill-all": kill_all,
    "kill-in-write": kill_in_a_write,
    "signal-storm": signal_storm,
    "terminate-group": terminate_group,
    "stop-rank": stop_rank,
    "damage-newest": damage_newest,
    "full-disk": fill_disk,
}


@dataclass(frozen=True)
class Outcome:
    """What a trial showed."""

    kind: str
    code: int | None  # of the broken job; None: it hung
    seconds: float  # from the fault to its end
    problems: tuple[str, ...]


def checkpoints(run_dir: Path) -> list[Path]:
    """Those that are published, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-*[0-9]"))


@contextmanager
def room(kind: str, folder: Path) -> Iterator[Path]:
    """A directory for the run: on a small disk of its own where the disk is to be filled."""
    folder.mkdir()
    if kind != "full-disk":
        yield folder
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def run_trial(kind: str, draw: random.Random, config: Path, whole: Path, folder: Path) -> Outcome:
    """Break a run, go on, compare with the run in `whole`.

    Raises:
        Missed: the fault found nothing to break.
    """
    run_dir, problems = folder / "run", []
    job = Job(config, run_dir, OVERRIDES, RANKS, folder.with_suffix(".log"))
    try:
        FAULTS[kind](job, draw)
    except Missed:
        job.end(LONGEST)
        raise
    began = time.monotonic()
    code = job.end(BOUND)
    seconds = time.monotonic() - began
    if code is None:
        problems.append("hang")
    (folder / "ballast").unlink(missing_ok=True)
    there = checkpoints(run_dir)
    newest = (there[:-1] if kind == "damage-newest" else there)[-1:]
    if (run_dir / "complete.json").exists() != (f"step-{STEPS:06d}" in {path.name for path in there}):
        problems.append("complete.json and the last checkpoint disagree")

    again = Job(config, run_dir, OVERRIDES, RANKS, job.log)
    if (found := again.end(LONGEST)) != 0:
        problems.append(f"the same command ended with {found}")
    elif any(path.name not in again.output() for path in newest):
        problems.append(f"lost: it did not go on from {newest[0].name}")
    elif numbers(read_metrics(run_dir)) != numbers(read_metrics(whole)):
        problems.append("other losses")
    elif final_state(run_dir) != final_state(whole):
        problems.append("other weights")
    elif not (run_dir / "complete.json").exists():
        problems.append("complete, but no complete.json")
    return Outcome(kind, code, seconds, tuple(problems))


def table(outcomes: list[Outcome]) -> str:
    """Markdown, a row for each kind."""
    lines = [
        "| fault | trials | exit codes of the broken job | seconds to its end, median, most | hangs | lost | other |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(outcome.kind for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.kind == kind]
        codes = ", ".join(f"{code} ({n})" for code, n in sorted(Counter(str(o.code) for o in own).items()))
        times, said = [outcome.seconds for outcome in own], [text for outcome in own for text in outcome.problems]
        hangs, lost = said.count("hang"), sum(text.startswith("lost") for text in said)
        ended = f"{statistics.median(times):.1f}, {max(times):.1f}"
        lines.append(f"| {kind} | {len(own)} | {codes} | {ended} | {hangs} | {lost} | {len(said) - hangs - lost} |")
    return "\n".join(lines)


def may_mount(folder: Path) -> bool:
    """Whether a tmpfs can be had."""
    try:
        with room("full-disk", folder):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def main(argv: list[str]) -> int:
    """Run the trials; 1 when any of them showed a problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, required=True, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    args = parser.parse_args(argv)
    draw, outcomes = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_run(folder, top_k=2)
        kinds = list(args.kinds)
        if "full-disk" in kinds and not may_mount(folder / "probe"):
            kinds.remove("full-disk")
            print("full-disk: skipped, a tmpfs may not be mounted here", flush=True)
        train(config, folder / "whole", OVERRIDES, RANKS)
        order = [kinds[number % len(kinds)] for number in range(args.trials)]
        draw.shuffle(order)
        for number, kind in enumerate(order):
            attempt = 0
            while True:
                trial = folder / f"trial-{number:03d}-{attempt}"
                try:
                    with room(kind, trial):
                        outcome = run_trial(kind, draw, config, folder / "whole", trial)
                    break
                except Missed:
                    attempt += 1
            outcomes.append(outcome)
            said = "; ".join(outcome.problems) or "ok"
            print(f"{number + 1}/{args.trials} {kind}: exit {outcome.code} {outcome.seconds:.1f} s: {said}", flush=True)
            if outcome.problems:
                print(trial.with_suffix(".log").read_text()[-6000:], file=sys.stderr, flush=True)
    print("\n" + table(outcomes))
    return 1 if any(outcome.problems for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
