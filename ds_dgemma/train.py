"""The recipe: fine-tune DiffusionGemma as a config says. Read this first.

    deepspeed [--num_gpus N | --hostfile H] --module ds_dgemma.train --config C.yaml [--set a.b=value ...]

The same command continues a run that was interrupted, from its newest complete checkpoint. SIGTERM, SIGINT and SIGUSR1
stop a run after a checkpoint, a second one at once; launch/README.md has the exit codes.
"""

import argparse
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from ds_dgemma.checkpoint.retention import prune
from ds_dgemma.checkpoint.run_state import step_directory
from ds_dgemma.checkpoint.save import NotWritten, save
from ds_dgemma.checkpoint.weights import local_directory
from ds_dgemma.config.file import load_config
from ds_dgemma.config.run import RunConfig
from ds_dgemma.engine.connect import connect
from ds_dgemma.engine.deepspeed_engine import count_steps_done, start_engine
from ds_dgemma.engine.optimizer_state import adam_step, create_moments, owned_shards
from ds_dgemma.errors import EXIT_BAD_NUMBERS, EXIT_STOPPED, EXIT_USER_ERROR, BadNumbers, UserError
from ds_dgemma.evaluation.validation import validate
from ds_dgemma.objective.denoising import DenoisingObjective
from ds_dgemma.ranks.layout import RankLayout, agreed, disconnect, gather
from ds_dgemma.ranks.stop_request import StopRequest
from ds_dgemma.run.bad_steps import BadSteps
from ds_dgemma.run.directory import (
    CHECKPOINTS,
    METRICS,
    check_shared,
    claim,
    contents,
    find_start,
    mark_complete,
    mark_unfinished,
    write_settings,
)
from ds_dgemma.run.open_model import fill_model
from ds_dgemma.run.prepare import Prepared, facts_of, open_batches, prepare, waited
from ds_dgemma.run.requirements import check_environment
from ds_dgemma.run.restore import continue_adapter, restore
from ds_dgemma.run.update import update
from ds_dgemma.run.utilisation import Utilisation
from ds_dgemma.tracking.metrics import START
from ds_dgemma.tracking.sinks import ConsoleSink, JsonlSink, Sink, Tracker, WandbSink
from ds_dgemma.tracking.spikes import SpikeDetector, past_losses
from ds_dgemma.watch.launcher_watch import watch_launcher
from ds_dgemma.watch.liveness import Liveness

DOWNLOAD_HOURS = 24
SECONDS_TO_TELL = 20


def train(config: RunConfig, ranks: RankLayout, prepared: Prepared, tracker: Tracker, stop: StopRequest) -> bool:
    """Train from the prepared start to `train.max_steps` and return True, or False when asked to stop before; a
    collective.

    Raises:
        BadNumbers: on every rank, after too many steps in a row that were skipped.
        NotWritten: on every rank, a checkpoint that the run may not go on without.
    """
    tracker.track({"kind": START, "step": prepared.start, **prepared.attention})
    stack = fill_model(prepared.model, ranks, prepared.deepspeed, config.train.precision, prepared.resumed, config.seed)
    objective = DenoisingObjective(stack, config.objective.logits_chunk_mib, config.objective.loss).train()
    engine = start_engine(objective, prepared.deepspeed, config.optimizer)
    create_moments(engine, 0)  # before the first step, or a checkpoint after skipped ones would find none
    if prepared.resumed:
        restore(engine, ranks, prepared.resumed)
        prepared.resumed.close()
        count_steps_done(engine, prepared.start)
    elif prepared.model.adapters and prepared.model.adapters.continued:
        continue_adapter(engine, ranks, prepared.model.adapters.continued)
    stream = open_batches(config, ranks, prepared)
    checkpoints, last = config.run.dir / CHECKPOINTS, config.train.max_steps
    batches = iter(stream)
    bad_steps = BadSteps(
        config, ranks, stream, prepared.facts, prepared.resumed and prepared.resumed.checkpoint, tracker
    )
    metrics = config.run.dir / METRICS
    spikes = SpikeDetector(config.health, past_losses(metrics, config.health.spike_window) if ranks.is_main else ())
    utilisation = Utilisation.on(ranks.device, config.tracking.peak_tflops, stack)
    if prepared.held_out and not prepared.start:
        tracker.track(
            {
                "kind": "validation",
                "step": 0,
                **validate(engine, prepared.held_out, objective.vocab_size, config, ranks, prepared.images),
            }
        )
    for step in range(prepared.start + 1, last + 1):
        stop.step = step  # from here on a signal waits for the end of the step
        done = update(engine, batches, step, config, ranks, utilisation)
        tracker.track(done.metrics)
        bad_steps.check(done)
        if spike := spikes.look(step, done.metrics.loss):
            tracker.track(spike)
        if prepared.held_out and (step == last or due(step, config.validation.every)):
            losses = validate(engine, prepared.held_out, objective.vocab_size, config, ranks, prepared.images)
            tracker.track({"kind": "validation", "step": step, **losses})
            prepared.scores.add("validation", step, losses)
        if prepared.exam and (step == last or due(step, config.evaluation.every)):
            shares = prepared.exam.take(engine, ranks)
            tracker.track({"kind": "evaluation", "step": step, **shares})
            prepared.scores.add("evaluation", step, shares)
        asked, ends = stop.agreed(ranks), step == last or waited(prepared.scores, config)
        if asked or ends or due(step, config.checkpoint.every):
            facts = {
                **prepared.facts,
                **facts_of(stream),
                **prepared.scores.facts(step),
                "adam_step": adam_step(engine),
                "bad_steps_in_a_row": bad_steps.in_a_row,
            }
            try:
                save(checkpoints, step, owned_shards(engine, ranks), ranks.rank, facts)
            except NotWritten as error:  # on every rank
                if asked or ends or config.checkpoint.on_error == "stop":
                    raise
                tracker.track({"kind": "checkpoint_failed", "step": step, "error": f"{error} The run goes on."})
            else:
                if ranks.is_main:
                    prune(checkpoints, step, config.checkpoint)
        if ends:
            if ranks.is_main and step < last:
                print(f"stopped early after step {step}: {prepared.scores.told()}", flush=True)
            break
        if asked:
            reasons = stop.reasons(ranks)
            if ranks.is_main:
                where = step_directory(checkpoints, step)
                print(f"stopped after step {step} by {reasons}: {where} is whole, the same command continues")
            return False
    return True


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


def open_tracker(config: RunConfig, ranks: RankLayout, start: int, stop: StopRequest) -> Tracker:
    """Rank 0's sinks; the metrics file is cut back to the step that the run continues from."""
    if not ranks.is_main:
        return Tracker([], stop.wish)
    sinks: list[Sink] = [
        JsonlSink(config.run.dir / METRICS, start, patient=config.checkpoint.on_error == "continue"),
        ConsoleSink(config.train.max_steps, start, config.tracking.console_every),
    ]
    if config.tracking.wandb.mode != "disabled":
        sinks.append(WandbSink(config.tracking.wandb, config.run.dir, config.model_dump(mode="json")))
    return Tracker(sinks, stop.wish)


def main(argv: list[str] | None = None) -> int:
    """Parse, connect, run; the exit code, returned or as SystemExit (`errors.py`)."""
    parser = argparse.ArgumentParser(
        prog="ds_dgemma.train", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
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
    watch_launcher(stop)
    try:
        connect(ranks, config.parallel.collective_timeout_minutes)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    with Liveness(ranks, config.parallel.collective_timeout_minutes, stop):
        code = run(config, ranks, stop)
        disconnect()
    return code


def run(config: RunConfig, ranks: RankLayout, stop: StopRequest) -> int:
    """Check, train and say when the run is complete; a collective. The exit code."""
    with agreed(ranks, hours=DOWNLOAD_HOURS):
        if ranks.local_rank == 0:  # the node's other ranks find it in the cache
            local_directory(config.model.path, config.model.revision)
    with agreed(ranks):
        lock = claim(config.run.dir) if ranks.is_main else nullcontext()
    seen = gather(contents(config.run.dir), ranks)
    with agreed(ranks):
        check_shared(config.run.dir, seen)
    with agreed(ranks):
        start = find_start(config)  # it looks together; what it finds, all find
    with agreed(ranks):
        prepared = prepare(config, ranks, start)
    last, over = config.train.max_steps, prepared.is_over(config)
    with agreed(ranks):
        if ranks.is_main:
            write_settings(config, prepared.deepspeed)
            if not over:
                mark_unfinished(config.run.dir)
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


if __name__ == "__main__":
    try:
        code = main()
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 0
    sys.stdout.flush()
    sys.stderr.flush()
    # All is closed. Threads of gloo and of DeepSpeed's libraries may not be, and their destructors can abort a
    # finished run.
    os._exit(code)
