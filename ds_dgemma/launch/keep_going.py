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
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from signal import Signals

from ds_dgemma.config.file import load_config
from ds_dgemma.config.recorded import CHECKPOINTS, COMPLETE, CONFIG, check_same_run
from ds_dgemma.config.run import RunConfig
from ds_dgemma.errors import EXIT_BAD_NUMBERS, EXIT_STOPPED, EXIT_USER_ERROR, UserError
from ds_dgemma.launch import multinode
from ds_dgemma.launch.job import Nodes, keep_signals, run_job

FINAL = {
    EXIT_USER_ERROR: "a mistake that a new start would repeat",
    EXIT_BAD_NUMBERS: "numbers gone bad, which a new start would repeat",
    EXIT_STOPPED: "its ranks were asked to stop; the same command continues",
}
LONGEST_SECONDS = 7 * 24 * 3600  # between two tries


def keep_going(
    start: Callable[[bool], int], config: RunConfig, limits: argparse.Namespace, signals: list[Signals]
) -> int:
    """Call `start` until the run is complete or there is a reason to stop; returns the exit code."""
    failures = tries = 0
    while True:
        before = newest_step(config.run.dir)
        if done := completed_step(config):
            say(f"{config.run.dir} is complete at step {done}")
            return 0
        if signals:
            say(f"stopped by {signals[0].name}; newest checkpoint: step {before}, the same command continues from it")
            return EXIT_STOPPED if len(signals) == 1 else 128 + signals[1]
        tries += 1
        say(f"try {tries}, from {f'step {before}' if before else 'the start'} of {config.train.max_steps}")
        code, step = start(tries > 1), newest_step(config.run.dir)
        if completed_step(config) or signals:
            continue
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
        until = time.monotonic() + pause
        while time.monotonic() < until and not signals:
            time.sleep(min(0.2, pause))


def say(text: str) -> None:
    """One line per event, beside what the training says."""
    print(f"keep_going: {text}", file=sys.stderr, flush=True)


def completed_step(config: RunConfig) -> int:
    """The last step of this very run, 0 unless its directory has all of it: marker, the same settings, checkpoint.

    Whatever else is there, the training itself goes on from it or refuses it.
    """
    directory = config.run.dir
    try:
        complete = json.loads((directory / COMPLETE).read_text())
        step, patience = int(complete["step"]), complete.get("early_stopping_patience", 0)
        check_same_run(directory / CONFIG, config)
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return 0
    there = (directory / CHECKPOINTS / f"step-{step:06d}").is_dir()
    ended = step >= config.train.max_steps or 0 < config.train.early_stopping_patience == patience
    return step if there and ended else 0


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, 0 without one: a directory gets this name when all of it is written."""
    names = (path.name.removeprefix("step-") for path in (run_dir / CHECKPOINTS).glob("step-*"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def starter(command: list[str], signals: list[Signals]) -> Callable[[bool], int]:
    """What starts a command, for the first time or again.

    Raises:
        UserError: it is none that can be kept going.
    """
    program, *arguments = command[1:] if command[1:] and Path(command[0]).name in ("bash", "sh") else command
    if Path(program).name == "multinode.sh":
        return lambda again: multinode.main(arguments, signals, again)
    if {"--hostfile", "-H"} & {word.partition("=")[0] for word in command}:
        raise UserError("--hostfile: ranks on other machines are kept by launch/multinode.sh alone. Give its command.")
    if not shutil.which(command[0]):
        raise UserError(f"{command[0]}: no such command. Give the training's whole command, `deepspeed ...`.")
    return lambda _: run_job([command], signals, Nodes())


def main(argv: list[str] | None = None) -> int:
    """Check, then keep going."""
    options = argparse.ArgumentParser("launch/keep_going.sh", description=__doc__)
    options.formatter_class = argparse.RawTextHelpFormatter
    options.add_argument("--tries", type=int, default=5, help="in a row without a new checkpoint (default: 5)")
    options.add_argument("--wait", type=float, default=10, help="seconds before the second, then doubled")
    options.add_argument("--longest-wait", type=float, default=600, help="seconds (default: 600)")
    options.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND")
    args = options.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    training = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    training.add_argument("--config", type=Path)
    training.add_argument("--set", action="append", default=[])
    settings, _ = training.parse_known_args(command)
    signals = keep_signals()
    try:
        if settings.config is None or args.tries < 1:
            raise UserError("launch/keep_going.sh [--tries N] [--wait SECONDS] COMMAND, a training with its --config C")
        if not all(0 <= wait <= LONGEST_SECONDS for wait in (args.wait, args.longest_wait)):
            raise UserError(f"--wait, --longest-wait: expected seconds, 0 to {LONGEST_SECONDS:,}")
        config = load_config(settings.config, settings.set)
        resume, own = config.run.resume, (config.run.dir / CHECKPOINTS).resolve()
        if resume == "never" or (resume != "auto" and Path(resume).resolve().parent == own):
            raise UserError(f"run.resume = {resume}  would stop at the second try. Set run.resume: auto.")
        return keep_going(starter(command, signals), config, args, signals)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr, flush=True)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
