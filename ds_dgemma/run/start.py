"""Before the first step and after the last: parse, connect, check what a user can get wrong, end together."""

import argparse
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

from ds_dgemma.checkpoint.pretrained import open_pretrained
from ds_dgemma.checkpoint.run_directory import begin, check_shared, claim, find_start, mark_complete
from ds_dgemma.checkpoint.weights import local_directory
from ds_dgemma.config.division import check_expert_groups
from ds_dgemma.config.file import load_config
from ds_dgemma.config.recorded import METRICS, check_belongs
from ds_dgemma.config.run import RunConfig
from ds_dgemma.engine.connect import connect
from ds_dgemma.engine.ds_config import build_cpu_adam, deepspeed_config
from ds_dgemma.errors import EXIT_BAD_NUMBERS, EXIT_STOPPED, EXIT_USER_ERROR, BadNumbers, UserError
from ds_dgemma.ranks.layout import RankLayout, agreed, disconnect
from ds_dgemma.ranks.stop_request import StopRequest
from ds_dgemma.run.prepare import Prepared, prepare
from ds_dgemma.run.requirements import check_environment
from ds_dgemma.tracking.metrics import last_step
from ds_dgemma.tracking.services import open_services
from ds_dgemma.tracking.sinks import ConsoleSink, JsonlSink, Tracker
from ds_dgemma.watch.liveness import Liveness

DOWNLOAD_HOURS = 24
SECONDS_TO_TELL = 20

Train = Callable[[RunConfig, RankLayout, Prepared, Tracker, StopRequest], bool]


def open_tracker(config: RunConfig, ranks: RankLayout, start: int, stop: StopRequest) -> Tracker:
    """Rank 0's sinks; the metrics file is cut back to the step that the run continues from."""
    if not ranks.is_main:
        return Tracker([], stop.wish)
    told = last_step(config.run.dir / METRICS)  # before it is cut back
    services = open_services(config, start, told)
    console = ConsoleSink(config.train.max_steps, start, config.tracking.console_every)
    patient = config.checkpoint.on_error == "continue"
    return Tracker([JsonlSink(config.run.dir / METRICS, start, patient), console, *services], stop.wish)


def start(train: Train, about: str | None, argv: list[str] | None = None) -> int:
    """Parse, connect, check, train; the exit code, returned or as SystemExit (`errors.py`)."""
    parser = argparse.ArgumentParser(
        prog="ds_dgemma.train", description=about, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="the run's YAML")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", help="override a setting")
    # the launcher passes it; the environment says the same
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    stop = StopRequest()
    stop.listen()
    try:
        check_environment()
        config = load_config(args.config, args.set)
    except UserError as error:
        # All ranks of a host see the same: one of them tells.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(error, file=sys.stderr, flush=True)
        else:  # a launcher ends all ranks when one ends: this one's end would silence the one that tells
            time.sleep(SECONDS_TO_TELL)
        return EXIT_USER_ERROR
    ranks = RankLayout.from_environment(config.parallel.expert_parallel_size)
    stop.watch_launcher()
    try:
        connect(ranks, config.parallel.collective_timeout_minutes)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    with Liveness(ranks, config.parallel.collective_timeout_minutes, stop):
        with agreed(ranks):  # what config and ranks alone can have wrong, before anything is fetched or claimed
            deepspeed = deepspeed_config(config, ranks.world, ranks.device.type)
            check_expert_groups(config.parallel, {socket.gethostname(): ranks.local_world})
            build_cpu_adam(deepspeed)
        code = run(train, config, deepspeed, ranks, stop)
        disconnect()
    return code


def run(train: Train, config: RunConfig, deepspeed: dict[str, Any], ranks: RankLayout, stop: StopRequest) -> int:
    """Check, train and say when the run is complete; a collective. Returns the exit code.

    `deepspeed` is what DeepSpeed is told.
    """
    with agreed(ranks, hours=DOWNLOAD_HOURS):
        if ranks.local_rank == 0:  # the node's other ranks find it in the cache
            local_directory(config.model.path, config.model.revision)
    with agreed(ranks):
        lock = claim(config.run.dir) if ranks.is_main else nullcontext()
    with agreed(ranks):
        check_shared(config.run.dir, ranks)
        check_belongs(config)
    with agreed(ranks):
        found = find_start(config)  # it looks together; what it finds, all find
    if ranks.is_main:
        _warn(found.warnings)
    with agreed(ranks):
        pretrained = open_pretrained(config.model.path, config.model.revision, download=False)
        prepared = prepare(config, deepspeed, ranks, pretrained, found)
    last, over = config.train.max_steps, prepared.is_over(config)
    if ranks.is_main:
        print("\n".join(prepared.told), flush=True)
        _warn(prepared.warnings)
    with agreed(ranks):
        if ranks.is_main and not over:
            begin(config, deepspeed)
        tracker = open_tracker(config, ranks, prepared.start, stop)
    if ranks.is_main and over:
        print(f"{config.run.dir} is complete at step {prepared.start}: nothing is left to train", flush=True)
    with lock:
        try:
            with tracker:
                complete = over or train(config, ranks, prepared, tracker, stop)
        except BadNumbers as error:
            if ranks.is_main:
                print(error, file=sys.stderr, flush=True)
            return EXIT_BAD_NUMBERS
        if complete and ranks.is_main:
            step = max(prepared.start, stop.step or 0)
            mark_complete(config.run.dir, step, config.train.early_stopping_patience if step < last else 0)
    return 0 if complete else EXIT_STOPPED


def _warn(lines: Sequence[str]) -> None:
    for line in lines:
        print(f"warning: {line}", file=sys.stderr, flush=True)


def leave(main: Callable[[], int]) -> NoReturn:
    """End this process with the code of `main`, and nothing after it."""
    try:
        code = main()
    except SystemExit as ending:
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    # All is closed. Threads of gloo and of DeepSpeed's libraries may not be, and their destructors can abort a
    # finished run.
    os._exit(code)
