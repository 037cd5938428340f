"""The recipe: fine-tune DiffusionGemma as a config says. Read this first.

    deepspeed [--num_gpus N | --hostfile H] --module ds_dgemma.train --config C.yaml [--set a.b=value ...]

The same command continues a run that was interrupted, from its newest complete checkpoint. SIGTERM, SIGINT and SIGUSR1
stop a run after a checkpoint, a second one at once; launch/README.md has the exit codes.
"""

import time
from collections.abc import Iterator
from typing import Any

import torch

from ds_dgemma.checkpoint.run_state import step_directory
from ds_dgemma.config.recorded import CHECKPOINTS, METRICS
from ds_dgemma.config.run import RunConfig
from ds_dgemma.data.batch import Batch
from ds_dgemma.engine.deepspeed_engine import gradient_norm, set_learning_rate
from ds_dgemma.engine.router_balance import router_balance
from ds_dgemma.engine.schedule import learning_rate
from ds_dgemma.model.lora import seed_dropout
from ds_dgemma.objective.denoising import TokenWeights, mean
from ds_dgemma.ranks.layout import RankLayout
from ds_dgemma.ranks.stop_request import StopRequest
from ds_dgemma.run.bad_steps import BadSteps
from ds_dgemma.run.keep import keep
from ds_dgemma.run.measure import due, measure
from ds_dgemma.run.open_engine import open_engine
from ds_dgemma.run.prepare import Prepared, facts_of, open_batches, waited
from ds_dgemma.run.start import leave, start
from ds_dgemma.run.step import Update, count, spoil_if_not_finite, summed
from ds_dgemma.run.utilisation import Utilisation
from ds_dgemma.tracking.metrics import START, StepMetrics, memory_gib
from ds_dgemma.tracking.sinks import Tracker
from ds_dgemma.tracking.spikes import SpikeDetector, past_losses


def train(config: RunConfig, ranks: RankLayout, prepared: Prepared, tracker: Tracker, stop: StopRequest) -> bool:
    """Train from the prepared start to `train.max_steps` and return True, or False when asked to stop before; a
    collective.

    Raises:
        BadNumbers: on every rank, after too many steps in a row that were skipped.
        NotWritten: on every rank, a checkpoint that the run may not go on without.
    """
    tracker.track({"kind": START, "step": prepared.start, **prepared.attention})
    engine, stream = open_engine(config, ranks, prepared), open_batches(config, ranks, prepared)
    batches, last = iter(stream), config.train.max_steps
    resumed_from = prepared.resumed and prepared.resumed.checkpoint
    bad_steps = BadSteps(config, ranks, prepared.facts, resumed_from, tracker)
    past = past_losses(config.run.dir / METRICS, config.health.spike_window) if ranks.is_main else ()
    spikes = SpikeDetector(config.health, past)
    utilisation = Utilisation.on(ranks.device, config.tracking.peak_tflops, engine.module.model)
    if not prepared.start:
        measure(engine, 0, config, ranks, prepared, tracker)
    for step in range(prepared.start + 1, last + 1):
        stop.step = step  # from here on a signal waits for the end of the step
        done = update(engine, batches, step, config, ranks, utilisation)
        tracker.track(done.metrics)
        bad_steps.check(done)
        if spike := spikes.look(step, done.metrics.loss):
            tracker.track(spike)
        measure(engine, step, config, ranks, prepared, tracker)
        asked, ends = stop.agreed(ranks), step == last or waited(prepared.scores, config)
        if asked or ends or due(step, config.checkpoint.every):
            facts = {**prepared.facts, **facts_of(stream), **prepared.scores.facts(step), **bad_steps.facts()}
            keep(engine, step, config, ranks, facts, tracker, must=asked or ends)
        if ends:
            if ranks.is_main and step < last:
                print(f"stopped early after step {step}: {prepared.scores.told()}", flush=True)
            break
        if asked:
            reasons = stop.reasons(ranks)
            if ranks.is_main:
                where = step_directory(config.run.dir / CHECKPOINTS, step)
                print(f"stopped after step {step} by {reasons}: {where} is whole, the same command continues")
            return False
    return True


def update(
    engine: Any,
    batches: Iterator[list[Batch]],
    step: int,
    config: RunConfig,
    ranks: RankLayout,
    utilisation: Utilisation,
) -> Update:
    """One optimizer step: count, then forward and backward for every micro-batch; a collective."""
    began = time.perf_counter()
    micro_batches, settings = next(batches), config.objective
    # The tokens of the whole global batch, before any forward: a token counts the same on every rank.
    counts = count(micro_batches, ranks, utilisation)
    shares = ranks.world * len(micro_batches)
    weights = TokenWeights.global_mean(counts.diffusion, counts.ar, settings.encoder_loss_weight, shares)
    lr = learning_rate(step - 1, config.train.max_steps, config.optimizer)
    set_learning_rate(engine, lr)

    balance = router_balance(engine, micro_batches, ranks, settings.router_balance_weight)
    losses = []
    seed_dropout(config.seed, step, ranks.rank)
    for batch in micro_batches:
        parts = engine(batch.to(ranks.device), weights, balance)
        engine.backward(spoil_if_not_finite(parts.loss))
        engine.step()  # after every micro-batch: DeepSpeed counts the boundary itself
        losses.append(torch.stack([parts.loss.detach(), parts.diffusion_nll, parts.ar_nll, parts.router]))

    came = summed(engine, step, losses, ranks)
    diffusion, ar = mean(came.diffusion_nll, counts.diffusion), mean(came.ar_nll, counts.ar)
    seconds = time.perf_counter() - began
    metrics = StepMetrics(
        step=step,
        loss=diffusion + settings.encoder_loss_weight * ar + settings.router_balance_weight * came.router,
        loss_diffusion=diffusion,
        loss_ar=ar,
        loss_router=came.router if balance else None,
        grad_norm=gradient_norm(engine),
        lr=lr,
        samples=step * config.train.global_batch_size,
        tokens=int(counts.tokens),
        seconds=seconds,
        tokens_per_second=counts.tokens / seconds,
        memory_gib=memory_gib(ranks.device),
        mfu=utilisation.of(counts.work, seconds, ranks.world),
    )
    return Update(metrics, came.skipped, micro_batches, losses)


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says; the exit code, returned or as SystemExit (`errors.py`)."""
    return start(train, __doc__, argv)


if __name__ == "__main__":
    leave(main)
