"""Start a training again until its run is complete: after a lost node, a rank that died, a launcher that was killed.

    launch/keep_going.sh [--tries 5] [--wait 10] COMMAND

COMMAND is the training as it is started without this: `deepspeed --num_gpus 8 --module ds_dgemma.train --config ...`
or `launch/multinode.sh --hostfile H --config ...`. It is complete when the run directory has complete.json, this
config's settings and the checkpoint of that step, never by an exit code. A node that is away is waited for. Not tried
again are a user's mistake (2), numbers gone bad (5), and a run that was asked to stop (75).
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

from ds_dgemma.config.file import load_config, read_yaml
from ds_dgemma.config.run import RunConfig
from ds_dgemma.config.same_run import same_run_problems
from ds_dgemma.errors import EXIT_BAD_NUMBERS, EXIT_STOPPED, EXIT_UNREACHABLE, EXIT_USER_ERROR, UserError
from ds_dgemma.launch import multinode
from ds_dgemma.launch.job import Nodes, Signals, new_job, run_job
from ds_dgemma.launch.nodes import Unreachable

FINAL = {
    EXIT_USER_ERROR: "a mistake that a new start would repeat",
    EXIT_BAD_NUMBERS: "numbers gone bad, which a new start would repeat",
    EXIT_STOPPED: "its ranks were asked to stop; the same command continues",
}
LONGEST_SECONDS = 7 * 24 * 3600  # between two tries


@dataclass(frozen=True)
class Limits:
    """How often, and how long between."""

    tries: int  # in a row without a new checkpoint
    wait: float  # seconds before the second try; twice that before the third, and so on
    longest_wait: float


def keep_going(start: Callable[[], int], config: RunConfig, limits: Limits, signals: Signals) -> int:
    """Call `start` until the run is complete or there is a reason to stop; returns the exit code."""
    run_dir = config.run.dir
    failures = tries = 0
    while True:
        if done := completed_step(config):
            say(f"{run_dir} is complete at step {done}")
            return 0
        before = newest_step(run_dir)
        if signals.received:
            return _stopped(signals, before)
        tries += 1
        say(f"try {tries}, from {f'step {before}' if before else 'the start'} of {config.train.max_steps}")
        code = start()
        if completed_step(config) or signals.received:
            continue
        step = newest_step(run_dir)
        if code in FINAL:
            say(f"ended with exit code {code}: {FINAL[code]}")
            return code
        failures = failures + 1 if step <= before else 1
        ended = f"try {tries} ended with exit code {code} and is not complete; newest checkpoint: step {step}"
        if failures >= limits.tries:
            say(f"{ended}. Given up: {failures} tries without a new one")
            return code or 1
        pause = min(limits.wait * 2 ** min(failures - 1, 30), limits.longest_wait)
        say(f"{ended}. Again in {pause:g} s")
        signals.sleep(pause)


def _stopped(signals: Signals, step: int) -> int:
    first, *more = signals.received
    say(f"stopped by {first.name}; newest checkpoint: step {step}, the same command continues from it")
    return 128 + more[0] if more else EXIT_STOPPED


def say(text: str) -> None:
    """One line per event, beside what the training says."""
    print(f"keep_going: {text}", file=sys.stderr, flush=True)


def completed_step(config: RunConfig) -> int:
    """The last step of this very run, 0 unless its directory has all of it: marker, the same settings, checkpoint.

    Whatever else is there, the training itself goes on from it or refuses it.
    """
    directory = config.run.dir
    try:
        complete = json.loads((directory / "complete.json").read_text())
        step, patience = int(complete["step"]), complete.get("early_stopping_patience", 0)
        same = not same_run_problems(read_yaml(directory / "config.yaml"), config)
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return 0
    there = (directory / f"checkpoints/step-{step:06d}").is_dir()
    ended = step >= config.train.max_steps or 0 < config.train.early_stopping_patience == patience
    return step if same and there and ended else 0


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, 0 without one: a directory gets this name when all of it is written."""
    names = (path.name.removeprefix("step-") for path in (run_dir / "checkpoints").glob("step-*"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def starter(command: list[str], signals: Signals) -> Callable[[], int]:
    """What starts a command once.

    Raises:
        UserError: it is none that can be kept going.
    """
    program, *arguments = command[1:] if command[1:] and Path(command[0]).name in ("bash", "sh") else command
    if Path(program).name == "multinode.sh":
        return _over_nodes(arguments, signals)
    before_module = command[: command.index("--module")] if "--module" in command else command
    if any(word.partition("=")[0] in ("--hostfile", "-H") for word in before_module):
        raise UserError(
            "deepspeed --hostfile: ranks on other machines are kept by launch/multinode.sh alone. Give its command."
        )
    if not shutil.which(command[0]):
        raise UserError(f"{command[0]}: no such command. Give the training's whole command, `deepspeed ...`.")
    return lambda: run_job([command], os.environ, signals, Nodes(), new_job())


def _over_nodes(arguments: list[str], signals: Signals) -> Callable[[], int]:
    possible = False  # a start, once: what is wrong since then may be a node that comes back

    def start() -> int:
        nonlocal possible
        try:
            job = multinode.plan(arguments)
        except UserError as error:
            say(str(error))
            away = possible or isinstance(error, Unreachable)
            return EXIT_UNREACHABLE if away else EXIT_USER_ERROR
        possible = True
        return EXIT_STOPPED if signals.received else multinode.run(job, signals)

    return start


def check_continues(config: RunConfig) -> None:
    """Raise `UserError` where the second try would refuse what the first one left."""
    resume, own = config.run.resume, config.run.dir / "checkpoints"
    if resume == "never" or (resume != "auto" and Path(resume).resolve().parent == own.resolve()):
        raise UserError(
            f"run.resume = {resume}  would stop at the second try. Set run.resume: auto to keep a run going."
        )


def seconds(text: str) -> float:
    """A time to wait, for argparse."""
    value = float(text)
    if not 0 <= value <= LONGEST_SECONDS:
        raise argparse.ArgumentTypeError(f"expected seconds, 0 to {LONGEST_SECONDS:,}, found {text}")
    return value


def parser() -> argparse.ArgumentParser:
    """The options before the command."""
    options = argparse.ArgumentParser(
        prog="launch/keep_going.sh", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("--tries", type=int, default=5, help="in a row without a new checkpoint (default: 5)")
    options.add_argument(
        "--wait", type=seconds, default=10, help="seconds before the second, then doubled (default: 10)"
    )
    options.add_argument("--longest-wait", type=seconds, default=600, help="seconds (default: 600)")
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
        if settings.config is None or not command or args.tries < 1:
            raise UserError("launch/keep_going.sh [--tries N] [--wait SECONDS] COMMAND, a training with its --config C")
        config = load_config(settings.config, settings.set)
        check_continues(config)
        limits = Limits(args.tries, args.wait, args.longest_wait)
        return keep_going(starter(command, signals), config, limits, signals)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
