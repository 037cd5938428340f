"""Compute a skipped step again, alone: one process, no launcher, no update; tell which numbers are not finite.

Each micro-batch is run as it was, then each of its examples by itself. The weights are a checkpoint's, so unless the
step followed it they are not the very ones that the step had.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from ds_dgemma.checkpoint.pretrained import open_pretrained
from ds_dgemma.checkpoint.run_state import newest_until, open_state
from ds_dgemma.checkpoint.same import check_same_model
from ds_dgemma.config.recorded import CHECKPOINTS, CONFIG, recorded_config
from ds_dgemma.config.run import RunConfig
from ds_dgemma.data.batch import Batch
from ds_dgemma.data.examples import ExampleSet
from ds_dgemma.data.order import Item
from ds_dgemma.data.split import order_of, read_split
from ds_dgemma.data.stream import Share, make_batch
from ds_dgemma.engine.connect import connect
from ds_dgemma.engine.router_balance import router_balance
from ds_dgemma.errors import UserError
from ds_dgemma.model.lora import seed_dropout
from ds_dgemma.model.stack import DiffusionGemmaStack
from ds_dgemma.objective.collate import collate
from ds_dgemma.objective.corruption import Corruption
from ds_dgemma.objective.denoising import DenoisingObjective, TokenWeights
from ds_dgemma.ranks.layout import RankLayout, disconnect
from ds_dgemma.run.open_model import fill_model, outline_run
from ds_dgemma.run.replay_file import SeenMicroBatch, SkippedStep, read_skipped


@dataclass(frozen=True)
class Outcome:
    """What one forward and backward gave."""

    loss: float
    diffusion_nll: float
    ar_nll: float
    gradient_norm: float
    first_bad: str | None  # the parameter whose gradient was the first, on the way back, not to be finite

    @property
    def finite(self) -> bool:
        """Whether all is."""
        return all(map(math.isfinite, (self.loss, self.diffusion_nll, self.ar_nll, self.gradient_norm)))

    def __str__(self) -> str:
        first = f", first in {self.first_bad}" if self.first_bad else ""
        parts = f"diffusion {self.diffusion_nll:.4f}  ar {self.ar_nll:.4f}  gradient norm {self.gradient_norm:.4g}"
        return f"loss {self.loss:.4f}  {parts}{first}"


class Rows(NamedTuple):
    """The training examples, and how some of them become a batch."""

    examples: ExampleSet
    batch: Callable[[list[Item]], Batch]


class StepAlone:
    """The objective on one process. A gradient is measured as the backward pass makes it, and let go."""

    def __init__(
        self, objective: DenoisingObjective, batches: list[Batch], config: RunConfig, ranks: RankLayout
    ) -> None:
        self._objective, self._device = objective.train(), ranks.device
        diffusion, ar = (sum(column) for column in zip(*(batch.counts() for batch in batches), strict=True))
        settings = config.objective
        self._weights = TokenWeights.global_mean(diffusion, ar, settings.encoder_loss_weight, len(batches))
        self._balance = router_balance(objective, batches, ranks, settings.router_balance_weight)
        self._norms: list[tuple[str, float]] = []
        for name, parameter in objective.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(self._take, name))

    def run(self, batch: Batch) -> Outcome:
        """Forward and backward of a batch."""
        self._norms.clear()
        parts = self._objective(batch.to(self._device), self._weights, self._balance)
        parts.loss.backward()
        loss, diffusion_nll, ar_nll, _ = (float(value.detach()) for value in parts[:4])
        first_bad = next((name for name, norm in self._norms if not math.isfinite(norm)), None)
        gradient_norm = math.sqrt(sum(norm**2 for _, norm in self._norms))
        return Outcome(loss, diffusion_nll, ar_nll, gradient_norm, first_bad)

    def _take(self, name: str, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self._norms.append((name, float(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))))
        parameter.grad = None


def replay(file: Path, checkpoint: Path | None = None, from_model: bool = False) -> None:
    """Run the step that `file` tells of, and print what came of every micro-batch and example.

    The weights are those of `checkpoint`, of the model that the run started from, or else of the run's newest
    checkpoint that is not after the step.

    Raises:
        UserError: `file` is no replay file, or its config, data, model or checkpoint is gone or another.
    """
    step, run, ranks = read_skipped(file), file.resolve().parent.parent, RankLayout.from_environment(1)
    if not (run / CONFIG).is_file():
        raise UserError(f"{file} is not in a run directory's replay/: {run / CONFIG} is missing. Put it back there.")
    config = recorded_config(run / CONFIG)  # its run.dir is where the run was; it may have been moved
    if ranks.world > 1:
        raise UserError("replay runs in one process: start it without a launcher.")
    if config.data.streaming:
        raise UserError("replay needs the step's examples again, and those of data.streaming are not kept.")
    newest = checkpoint or newest_until(run / CHECKPOINTS, step.step) or step.checkpoint
    trained = open_state(newest) if newest and not from_model else None
    pretrained = open_pretrained(config.model.path, config.model.revision)
    _check_unchanged(file, "model.path", config.model.path, step.model_digest, pretrained.digest)
    examples = read_split(config, "train", pretrained.spec, pretrained.tokenizer)
    _check_unchanged(file, "data.train", config.data.named("train"), step.data_digest, examples.digest)
    model = outline_run(config, pretrained, ranks, trained is not None)
    if trained is not None:
        check_same_model(config.model.path, step.model_digest, trained.checkpoint)
        trained.check_fits(model.trained_sizes)
    corruption = Corruption(config.objective, config.seed, pretrained.text.vocab_size)
    collated = partial(collate, corruption, images=pretrained.images(config.data))
    rows = Rows(examples, partial(make_batch, examples=examples, collate=collated))
    connect(ranks, config.parallel.collective_timeout_minutes)
    try:
        stack = fill_model(model, ranks, {}, config.train.precision, trained, config.seed)
        source = trained.checkpoint.path if trained else config.model.path
        print(f"step {step.step} of {run}, skipped for its {step.problem}; weights of {source}")
        bad = list(_run_step(stack, step, rows, config, ranks))
        print(f"Reproduced: {', '.join(bad)}." if bad else "Not reproduced: with these weights every number is finite.")
    finally:
        disconnect()


def _check_unchanged(file: Path, setting: str, source: str, before: str, now: str) -> None:
    if now != before:
        raise UserError(f"{setting}: {source} has changed since {file} was written. Restore it.")


def _run_step(
    stack: DiffusionGemmaStack, step: SkippedStep, rows: Rows, config: RunConfig, ranks: RankLayout
) -> Iterator[str]:
    """Run every micro-batch of all ranks; yield the names of what was not finite."""
    size, order = config.train.global_batch_size, order_of(config, rows.examples)
    shares = [
        Share(size, step.micro_batch_size, seen.rank, step.ranks).items(order, step.step - 1, seen.micro_batch)
        for seen in step.micro_batches
    ]
    objective = DenoisingObjective(stack, config.objective.logits_chunk_mib, config.objective.loss)
    alone = StepAlone(objective, [rows.batch(share) for share in shares], config, ranks)
    for seen, share in zip(step.micro_batches, shares, strict=True):
        if not seen.micro_batch:
            seed_dropout(config.seed, step.step, seen.rank)  # a rank's micro-batches draw one after another
        yield from _run_micro_batch(alone, seen, share, rows)


def _run_micro_batch(alone: StepAlone, seen: SeenMicroBatch, share: list[Item], rows: Rows) -> Iterator[str]:
    """Print what came of a micro-batch and of its examples; yield the names of those that were not finite."""
    whole = alone.run(rows.batch(share))
    print(f"{seen.name}: {whole}  (in the run: loss {seen.loss:.4f})", flush=True)
    if not whole.finite:
        yield seen.name
    with torch.random.fork_rng():
        for item in share:
            batch = rows.batch([item])
            (number,), outcome = batch.sample_ids, alone.run(batch)
            noise = " ".join(f"{t:.4f}" for t in batch.noise_levels)
            canvases = " ".join(str(start) for _, start in batch.canvases)
            where = rows.examples.where(number)
            print(f"  example {number} ({where})  t {noise}  canvas at {canvases}  {outcome}", flush=True)
            if not outcome.finite:
                yield f"example {number}"
