"""Start a training again until its run is complete: after a lost node, a rank that died, a launcher that was killed.

    launch/keep_going.sh [--tries 5] [--wait 10] COMMAND

COMMAND is the training as it is started without this: `deepspeed --num_gpus 8 --module ds_dgemma.train --config ...`
or `launch/multinode.sh --hostfile H --config ...`. It is complete when the run directory's complete.json says so, never
by an exit code. Not tried again are a user's mistake (2), numbers gone bad (5), and a run that was asked to stop (75).
SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 to this process stops the run after a checkpoint, a second one at once.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ds_dgemma.config_file import load_config
from ds_dgemma.errors import EXIT_BAD_NUMBERS, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from ds_dgemma.launch import multinode
from ds_dgemma.launch.job import Nodes, Signals, new_job, run_job

FINAL = {
    EXIT_USER_ERROR: "a mistake that a new start would repeat",
    EXIT_BAD_NUMBERS: "numbers gone bad, which a new start would repeat",
    EXIT_STOPPED: "its ranks were asked to stop; the same command continues",
}


@dataclass(frozen=True)
class Limits:
    """How often, and how long between."""

    tries: int  # in a row without a new checkpoint
    wait: float  # seconds before the second try; twice that before the third, and so on
    longest_wait: float


def keep_going(start: Callable[[], int], run_dir: Path, last_step: int, limits: Limits, signals: Signals) -> int:
    """Call `start` until the run is complete or there is a reason to stop; returns the exit code."""
    failures = tries = 0
    while True:
        if is_complete(run_dir, last_step):
            say(f"{run_dir} is complete at step {last_step}")
            return 0
        before = newest_step(run_dir)
        if signals.received:
            return _stopped(signals, before)
        tries += 1
        say(f"try {tries}, from {f'step {before}' if before else 'the start'} of {last_step}")
        code = start()
        if is_complete(run_dir, last_step):
            continue
        step = newest_step(run_dir)
        if signals.received:
            continue
        if code in FINAL:
            say(f"ended with exit code {code}: {FINAL[code]}")
            return code
        failures = failures + 1 if step <= before else 1
        ended = f"try {tries} ended with exit code {code} and is not complete; newest checkpoint: step {step}"
        if failures >= limits.tries:
            say(f"{ended}. Given up: {failures} tries without a new one")
            return code or 1
        seconds = min(limits.wait * 2 ** (failures - 1), limits.longest_wait)
        say(f"{ended}. Again in {seconds:g} s")
        signals.sleep(seconds)


def _stopped(signals: Signals, step: int) -> int:
    first, *more = signals.received
    say(f"stopped by {first.name}; newest checkpoint: step {step}, the same command continues from it")
    return 128 + more[0] if more else EXIT_STOPPED


def say(text: str) -> None:
    """One line per event, beside what the training says."""
    print(f"keep_going: {text}", file=sys.stderr, flush=True)


def is_complete(run_dir: Path, last_step: int) -> bool:
    """Whether the run's marker says that it reached its last step."""
    try:
        return json.loads((run_dir / "complete.json").read_text())["step"] >= last_step
    except (OSError, ValueError, KeyError, TypeError):
        return False


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, 0 without one: a directory gets this name when all of it is written."""
    names = (path.name.removeprefix("step-") for path in (run_dir / "checkpoints").glob("step-*"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def starter(command: list[str], signals: Signals) -> Callable[[], int]:
    """What starts a command once.

    Raises:
        UserError: it is none that can be kept going.
    """
    if Path(command[0]).name == "multinode.sh":
        checked = [multinode.plan(command[1:])]  # a mistake is told before the first start

        def over_nodes() -> int:
            try:
                job = checked.pop() if checked else multinode.plan(command[1:])
            except UserError as error:  # the first start was possible: a node is away, and may come back
                say(str(error))
                return 1
            return EXIT_STOPPED if signals.received else multinode.run(job, signals)

        return over_nodes
    before_module = command[: command.index("--module")] if "--module" in command else command
    if any(word.partition("=")[0] in ("--hostfile", "-H") for word in before_module):
        raise UserError(
            "deepspeed --hostfile: ranks on other machines are kept by launch/multinode.sh alone. Give its command."
        )
    if not shutil.which(command[0]):
        raise UserError(f"{command[0]}: no such command. Give the training's whole command, `deepspeed ...`.")
    return lambda: run_job([command], os.environ, signals, Nodes(), new_job())


def parser() -> argparse.ArgumentParser:
    """The options before the command."""
    options = argparse.ArgumentParser(
        prog="launch/keep_going.sh", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("--tries", type=int, default=5, help="in a row without a new checkpoint (default: 5)")
    options.add_argument("--wait", type=float, default=10, help="seconds before the second, then doubled (default: 10)")
    options.add_argument("--longest-wait", type=float, default=600, help="seconds (default: 600)")
    options.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND")
    return options


def main(argv: list[str] | None = None) -> int:
    """Check, then keep going."""
    args = parser().parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    training = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    training.add_argument("--config", type=Path)
    training.add_argument("--set", action="append", default=[])
    settings, _ = training.parse_known_args(command)
    signals = Signals()
    try:
        if settings.config is None or args.tries < 1 or args.wait < 0:
            raise UserError("launch/keep_going.sh [--tries N] [--wait SECONDS] COMMAND, a training with its --config C")
        config = load_config(settings.config, settings.set)
        start = starter(command, signals)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    limits = Limits(args.tries, args.wait, args.longest_wait)
    return keep_going(start, config.run.dir, config.train.max_steps, limits, signals)


if __name__ == "__main__":
    sys.exit(main())
