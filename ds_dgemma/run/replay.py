"""Compute a skipped step again, alone: one process, no launcher, no update; tell which numbers are not finite.

Each micro-batch is run as it was, then each of its examples by itself. The weights are a checkpoint's, so unless the
step followed it they are not the very ones that the step had.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from pydantic import ValidationError

from ds_dgemma.checkpoint.run_state import Checkpoint, StateReader, check_same_model, open_state
from ds_dgemma.checkpoint.weights import local_directory, model_digest
from ds_dgemma.config.file import read_yaml
from ds_dgemma.config.run import RunConfig
from ds_dgemma.data.batch import Batch
from ds_dgemma.data.examples import ExampleSet
from ds_dgemma.data.image_files import image_files
from ds_dgemma.data.read import read_split
from ds_dgemma.data.tokenizer import load_tokenizer
from ds_dgemma.engine.connect import connect
from ds_dgemma.engine.router_balance import router_balance
from ds_dgemma.errors import UserError, first_fault
from ds_dgemma.model.lora import seed_dropout
from ds_dgemma.model.spec import read_spec, text_spec
from ds_dgemma.objective.collate import collate
from ds_dgemma.objective.corruption import Corruption
from ds_dgemma.objective.denoising import DenoisingObjective, TokenWeights
from ds_dgemma.ranks.layout import RankLayout, disconnect
from ds_dgemma.run.open_model import fill_model, outline_run
from ds_dgemma.run.replay_file import SeenExample, SeenMicroBatch, SkippedStep, checkpoints_until, read_skipped


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


class GradientNorm:
    """Measures each parameter's gradient as the backward pass makes it, and lets it go: they never are all there."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.clear()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda made, name=name: self._take(name, made))

    def clear(self) -> None:
        """Begin anew."""
        self._square, self.first_bad = 0.0, None

    @property
    def norm(self) -> float:
        """L2, of all gradients since `clear`."""
        return math.sqrt(self._square) if self._square >= 0 else math.nan

    def _take(self, name: str, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        norm = float(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
        if not math.isfinite(norm) and self.first_bad is None:
            self.first_bad = name
        self._square += norm**2
        parameter.grad = None


class StepAlone:
    """The objective on one process, with what it takes to run any part of the step."""

    def __init__(
        self, objective: DenoisingObjective, batches: list[Batch], config: RunConfig, ranks: RankLayout
    ) -> None:
        self._objective = objective.train()
        self._gradient = GradientNorm(objective)
        self._device = ranks.device
        diffusion, ar = (sum(column) for column in zip(*(batch.counts() for batch in batches), strict=True))
        ar_weight, router_weight = config.objective.encoder_loss_weight, config.objective.router_balance_weight
        self._weights = TokenWeights.global_mean(diffusion, ar, ar_weight, len(batches))
        self._balance = router_balance(objective, batches, ranks, router_weight)

    def run(self, batch: Batch) -> Outcome:
        """Forward and backward of a batch."""
        self._gradient.clear()
        parts = self._objective(batch.to(self._device), self._weights, self._balance)
        parts.loss.backward()
        loss, diffusion_nll, ar_nll, _ = (float(value.detach()) for value in parts[:4])
        return Outcome(loss, diffusion_nll, ar_nll, self._gradient.norm, self._gradient.first_bad)


def replay(file: Path, checkpoint: Path | None = None, from_model: bool = False) -> None:
    """Run the step that `file` tells of, and print what came of every micro-batch and example.

    The weights are those of `checkpoint`, of the model that the run started from, or else of the run's newest
    checkpoint that is not after the step.

    Raises:
        UserError: `file` is no replay file, or its config, data, model or checkpoint is gone or another.
    """
    step = read_skipped(file)
    config = _config(step, file)
    ranks = RankLayout.from_environment(1)
    if ranks.world > 1:
        raise UserError("replay runs in one process: start it without a launcher.")
    trained = None if from_model else _weights(step, config, checkpoint)
    directory = local_directory(config.model.path, config.model.revision)
    if model_digest(directory) != step.model_digest:
        raise UserError(f"model.path: {config.model.path} has changed since {file} was written. Restore it.")
    if trained is not None:
        check_same_model(config.model.path, step.model_digest, trained.checkpoint)
    if config.data.streaming:
        raise UserError("replay needs the step's examples again, and those of data.streaming are not kept.")
    spec = read_spec(str(directory))
    text = text_spec(spec)
    tokenizer = load_tokenizer(directory, text.vocab_size)
    examples = read_split(config, "train", spec, tokenizer)
    if examples.digest != step.data_digest:
        raise UserError(f"data.train: {config.data.named('train')} has changed since {file} was written. Restore it.")
    corruption = Corruption(config.objective, step.seed, text.vocab_size)
    gather = partial(collate, corruption, images=image_files(tokenizer, spec, config.data))
    batches = [_batch(seen, examples, gather, file) for seen in step.micro_batches]
    model = outline_run(config, spec, directory, ranks, trained is not None)
    if trained is not None:
        trained.check_fits(model.trained_sizes(ranks))
    with _alone(ranks, config):
        stack = fill_model(model, ranks, {}, config.train.precision, trained, config.seed)
        objective = DenoisingObjective(stack, config.objective.logits_chunk_mib, config.objective.loss)
        print(_heading(step, config, trained.checkpoint if trained else None))

        def make(one: SeenExample) -> tuple[Batch, str]:
            return gather([(examples[one.index], one.epoch)]), examples.where(one.id)

        bad = list(_run_all(StepAlone(objective, batches, config, ranks), step, batches, make))
        print(_verdict(bad))


def _run_all(
    alone: StepAlone, step: SkippedStep, batches: list[Batch], make: Callable[[SeenExample], tuple[Batch, str]]
) -> Iterator[str]:
    """Print every outcome; yield the names of those that were not finite. `make`: an example's batch, and its place."""
    rank = None
    for seen, batch in zip(step.micro_batches, batches, strict=True):
        if seen.rank != rank:
            rank = seen.rank
            seed_dropout(step.seed, step.step, rank)  # a rank's micro-batches draw one after another
        whole = alone.run(batch)
        print(f"{seen.name}: {whole}  (in the run: loss {seen.loss:.4f})", flush=True)
        if not whole.finite:
            yield seen.name
        with torch.random.fork_rng():
            for one in seen.examples:
                single, where = make(one)
                outcome = alone.run(single)
                noise = " ".join(f"{t:.4f}" for t in one.noise_levels)
                canvases = " ".join(map(str, one.canvases))
                print(f"  example {one.id} ({where})  t {noise}  canvas at {canvases}  {outcome}", flush=True)
                if not outcome.finite:
                    yield f"example {one.id}"


def _verdict(bad: list[str]) -> str:
    if not bad:
        return "Not reproduced: with these weights every number is finite."
    return f"Reproduced: {', '.join(dict.fromkeys(bad))}."


def _heading(step: SkippedStep, config: RunConfig, trained: Checkpoint | None) -> str:
    if trained is None:
        source, done = f"model {config.model.path}", 0
    else:
        source, done = f"checkpoint {trained.path}", trained.step
    # A skipped step left the weights as they were: its own checkpoint has them too.
    between = 0 if done == step.step else step.step - 1 - done
    age = f"{between} steps before" if between > 0 else f"{-between} steps after" if between else "as they were"
    return f"step {step.step} of {config.run.dir}, skipped for its {step.problem}; weights of {source}, {age}"


def _config(step: SkippedStep, file: Path) -> RunConfig:
    beside = file.resolve().parent.parent / step.config.name  # the run directory may have been moved
    path = beside if beside.is_file() else step.config
    if not path.is_file():
        raise UserError(f"{file} is of a run whose {step.config} is gone. Put the file back into the run's replay/.")
    try:
        config = RunConfig.model_validate(read_yaml(path))
    except ValidationError as error:
        raise UserError(f"{path} is not what a run of this version writes: {first_fault(error)}.") from error
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": path.parent})})


def _weights(step: SkippedStep, config: RunConfig, chosen: Path | None) -> StateReader | None:
    """The checkpoint to read, whole to its last bit; None for the model."""
    if chosen is not None:
        return open_state(chosen)
    candidates = checkpoints_until(config.run.dir, step.step) or ([step.checkpoint] if step.checkpoint else [])
    for path in candidates:
        try:
            return open_state(path)
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)
    if not candidates:  # there was none yet
        return None
    raise UserError(
        f"no whole checkpoint from before step {step.step} is left in {config.run.dir}. Name one with --checkpoint, or "
        "say --model for the weights that the run started from."
    )


def _batch(seen: SeenMicroBatch, examples: ExampleSet, gather: Callable[..., Batch], file: Path) -> Batch:
    """The micro-batch, made again; what the file says of it must hold."""
    if not seen.examples or any(one.index >= len(examples) or one.index < 0 for one in seen.examples):
        raise UserError(f"{file}: {seen.name} has examples that the data has not.")
    batch = gather([(examples[one.index], one.epoch) for one in seen.examples])
    levels = tuple(level for one in seen.examples for level in one.noise_levels)
    if (tuple(one.id for one in seen.examples), levels) != (batch.sample_ids, batch.noise_levels):
        raise UserError(f"{file}: {seen.name} has other ids or noise levels than the run's config makes. Restore both.")
    return batch


@contextmanager
def _alone(ranks: RankLayout, config: RunConfig) -> Iterator[None]:
    connect(ranks, config.parallel.collective_timeout_minutes)
    try:
        yield
    finally:
        disconnect()
