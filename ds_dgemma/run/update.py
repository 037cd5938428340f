"""One optimizer step. When a loss or the gradient is not finite on any rank, no rank's weights move.

DeepSpeed (0.19.8) computes the gradient's norm over all ranks and all experts between the last backward pass and
AdamW, in every ZeRO stage and precision, and leaves the update out when it is not finite: weights, moments and
AdamW's step stay as they are. So it is enough to see to it that a bad loss cannot hide behind a finite gradient, and
that what was accumulated is gone (`was_skipped`).
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ds_dgemma.config.run import RunConfig
from ds_dgemma.data.batch import Batch
from ds_dgemma.engine.deepspeed_engine import gradient_norm, set_learning_rate, was_skipped
from ds_dgemma.engine.router_balance import router_balance
from ds_dgemma.engine.schedule import learning_rate
from ds_dgemma.model.lora import seed_dropout
from ds_dgemma.objective.denoising import TokenWeights, mean
from ds_dgemma.ranks.layout import RankLayout, sum_over_ranks
from ds_dgemma.run.utilisation import Utilisation
from ds_dgemma.tracking.metrics import StepMetrics, memory_gib


@dataclass(frozen=True)
class Update:
    """A step that was made, or left out."""

    metrics: StepMetrics
    skipped: bool  # by all ranks: a number was not finite
    micro_batches: list[Batch]  # this rank's
    losses: list[torch.Tensor]  # of each: loss as differentiated, diffusion nll, AR nll, router loss


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
    micro_batches = next(batches)
    # The tokens of the whole global batch, before any forward: a token counts the same on every rank.
    counts = [(batch.tokens(), *batch.counts()) for batch in micro_batches]
    totals = [*(float(sum(column)) for column in zip(*counts, strict=True)), utilisation.work(micro_batches)]
    tokens, diffusion_tokens, ar_tokens, work = sum_over_ranks(totals, ranks.device)
    ar_weight = config.objective.encoder_loss_weight
    shares = ranks.world * len(micro_batches)
    weights = TokenWeights.global_mean(diffusion_tokens, ar_tokens, ar_weight, shares)
    lr = learning_rate(step - 1, config.train.max_steps, config.optimizer)
    set_learning_rate(engine, lr)

    balance = router_balance(engine, micro_batches, ranks, config.objective.router_balance_weight)
    losses = []
    seed_dropout(config.seed, step, ranks.rank)
    for batch in micro_batches:
        parts = engine(batch.to(ranks.device), weights, balance)
        engine.backward(spoil_if_not_finite(parts.loss))
        engine.step()  # after every micro-batch: DeepSpeed counts the boundary itself
        losses.append(torch.stack([parts.loss.detach(), parts.diffusion_nll, parts.ar_nll, parts.router]))

    sums = torch.stack(losses).double().sum(0).tolist()
    _, diffusion_nll, ar_nll, router, skipped = sum_over_ranks([*sums, was_skipped(engine)], ranks.device)
    if skipped not in (0, ranks.world):
        raise RuntimeError(f"step {step}: {skipped:.0f} of {ranks.world} ranks skipped the update, so weights differ.")
    diffusion, ar = mean(diffusion_nll, diffusion_tokens), mean(ar_nll, ar_tokens)
    seconds = time.perf_counter() - began
    metrics = StepMetrics(
        step=step,
        loss=diffusion + ar_weight * ar + config.objective.router_balance_weight * router,
        loss_diffusion=diffusion,
        loss_ar=ar,
        loss_router=router if balance else None,
        grad_norm=gradient_norm(engine),
        lr=lr,
        samples=step * config.train.global_batch_size,
        tokens=int(tokens),
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        memory_gib=memory_gib(ranks.device),
        mfu=utilisation.of(work, seconds, ranks.world),
    )
    return Update(metrics, skipped > 0, micro_batches, losses)


def spoil_if_not_finite(loss: torch.Tensor) -> torch.Tensor:
    """The loss, bit for bit; where it is not finite its gradient is not either. Waits for no device."""
    return loss / loss.detach().isfinite()
