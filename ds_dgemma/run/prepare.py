"""Everything that is checked and read before the first weight."""

import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from ds_dgemma.checkpoint.pretrained import Pretrained, open_pretrained
from ds_dgemma.checkpoint.retention import Scores
from ds_dgemma.checkpoint.run_state import StateReader
from ds_dgemma.checkpoint.same import check_same_data, check_same_model, check_same_optimizer
from ds_dgemma.config.division import check_expert_groups
from ds_dgemma.config.run import RunConfig
from ds_dgemma.data.batch import Batch, Example
from ds_dgemma.data.examples import ExampleSet
from ds_dgemma.data.image_files import ImageFiles
from ds_dgemma.data.read import open_stream, order_of, read_split
from ds_dgemma.data.stream import Share, Stream
from ds_dgemma.data.streaming import Cursor, StreamedBatches, StreamedExamples
from ds_dgemma.engine.ds_config import build_cpu_adam, deepspeed_config
from ds_dgemma.engine.trainable import check_trained
from ds_dgemma.evaluation.exam import Exam
from ds_dgemma.objective.collate import collate
from ds_dgemma.objective.corruption import Corruption
from ds_dgemma.ranks.layout import RankLayout
from ds_dgemma.run.directory import Start
from ds_dgemma.run.open_model import OutlinedModel, choose_kernels, outline_run

CURSOR = "data_cursor"


@dataclass(frozen=True)
class Prepared:
    """All that was checked and read before the first weight."""

    deepspeed: dict[str, Any]
    model: OutlinedModel
    attention: dict[str, str]  # the kernel of each layer type
    collate: Callable[[list[tuple[Example, int]]], Batch]
    images: ImageFiles
    examples: ExampleSet | StreamedExamples
    held_out: list[Example]  # empty when nothing is validated
    exam: Exam | None  # questions to answer while training
    scores: Scores  # by which a checkpoint is the best
    resumed: StateReader | None
    facts: dict[str, Any]  # of the model and the data, kept in every checkpoint

    @property
    def start(self) -> int:
        """Steps that are done."""
        return self.resumed.checkpoint.step if self.resumed else 0

    def is_over(self, config: RunConfig) -> bool:
        """Whether the run ended before: by its steps, or by its patience."""
        return self.start >= config.train.max_steps or waited(self.scores, config)


def waited(scores: Scores, config: RunConfig) -> bool:
    """Whether nothing better came for as many measurements as the run has patience for."""
    return 0 < config.train.early_stopping_patience <= scores.since


def prepare(config: RunConfig, ranks: RankLayout, start: Start) -> Prepared:
    """Check everything else that a user can get wrong; no collective, no weights, no download of the model.

    Raises:
        UserError: what is wrong, and what to do about it.
    """
    settings = deepspeed_config(config, ranks.world, "cuda" if ranks.device.type == "cuda" else "cpu")
    check_expert_groups(config.parallel, {socket.gethostname(): ranks.local_world})
    pretrained, resumed = open_pretrained(config.model.path, config.model.revision, download=False), start.resumed
    model = outline_run(config, pretrained, ranks, resumed is not None)
    attention, dropped = choose_kernels(config, pretrained.spec, ranks.device)
    if resumed:
        check_same_model(config.model.path, pretrained.digest, resumed.checkpoint)
        check_same_optimizer(config.optimizer.type, resumed.checkpoint)
        resumed.check_fits(model.trained_sizes(ranks))
    check_trained(config, settings["zero_optimization"]["stage"], model.trained_names(), model.reader.files)
    images = pretrained.images(config.data)
    examples, told = _read_training(config, pretrained, ranks)
    measures = _read_measures(config, pretrained, images, ranks)
    facts = {
        "model": config.model.path,
        "model_digest": pretrained.digest,
        "optimizer": config.optimizer.type,
        "data_digest": examples.digest,
        "examples": len(examples) if isinstance(examples, ExampleSet) else 0,
    }
    build_cpu_adam(settings)
    if ranks.is_main:
        _say([*told, *measures.told], [*start.warnings, *_warnings(config, model, pretrained.text), *dropped], resumed)
    if resumed:
        check_same_data(config.data.named("train"), resumed.checkpoint, facts["data_digest"], facts["examples"])
    scores = Scores.continued(config.checkpoint.best_by, measures.digest, resumed.checkpoint if resumed else None)
    corruption = Corruption(config.objective, config.seed, pretrained.text.vocab_size)
    return Prepared(
        deepspeed=settings,
        model=model,
        attention=attention,
        collate=partial(collate, corruption, images=images),
        images=images,
        examples=examples,
        held_out=measures.held_out,
        exam=measures.exam,
        scores=scores,
        resumed=resumed,
        facts=facts,
    )


def _warnings(config: RunConfig, model: OutlinedModel, text: Any) -> Iterator[str]:
    if config.data.max_length > text.max_position_embeddings:
        yield (
            f"data.max_length {config.data.max_length:,} is above the model's max_position_embeddings, "
            f"{text.max_position_embeddings:,}: it was made for no positions behind that."
        )
    if config.optimizer.warmup_steps >= config.train.max_steps:
        yield "optimizer.warmup_steps is not below train.max_steps: the run ends before lr is reached."
    measured, saved = getattr(config, config.checkpoint.best_by.split("/")[0]).every, config.checkpoint.every
    if (config.checkpoint.keep_best or config.train.early_stopping_patience) and saved != measured:
        yield (
            f"{config.checkpoint.best_by} is measured every {measured} steps, checkpoints are every {saved} (0: at the "
            "end). The best may have none: set checkpoint.every equal to keep it."
        )
    if model.adapters and (warning := model.adapters.base_warning(config.model.path)):
        yield warning


def _say(told: Sequence[str], warnings: Sequence[str], resumed: StateReader | None) -> None:
    print("\n".join(told), flush=True)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    if resumed:
        print(f"continuing from {resumed.checkpoint.path}", flush=True)


def _read_training(
    config: RunConfig, model: Pretrained, ranks: RankLayout
) -> tuple[ExampleSet | StreamedExamples, list[str]]:
    """The training examples, and what is to be told of them."""
    if config.data.streaming:
        streamed = open_stream(config, model.spec, model.tokenizer, ranks.is_main)
        return streamed, [f"train: {len(streamed.readers)} sources are read while training"]
    examples = read_split(config, "train", model.spec, model.tokenizer, ranks.is_main)
    return examples, examples.report("train")


class _Measures(NamedTuple):
    """What the model is measured on while it trains."""

    held_out: list[Example]
    exam: Exam | None
    digest: str | None  # of what `checkpoint.best_by` is measured on
    told: list[str]


def _read_measures(config: RunConfig, model: Pretrained, images: ImageFiles, ranks: RankLayout) -> _Measures:
    held_out, exam, digest, told = [], None, None, []
    if config.validation.every:
        validation = read_split(config, "validation", model.spec, model.tokenizer, ranks.is_main)
        told = validation.report("validation")
        held_out = [validation[i] for i in range(min(len(validation), config.validation.examples))]
        digest = f"{validation.digest} {len(held_out)} {config.validation.noise_levels}"
    if config.evaluation.every:
        exam = Exam.of(config, model.directory, model.tokenizer, images)
        if config.checkpoint.best_by.startswith("evaluation/"):
            exam.check_measure(config.checkpoint.best_by)
            digest = exam.digest
    return _Measures(held_out, exam, digest, told)


def open_batches(config: RunConfig, ranks: RankLayout, prepared: Prepared) -> Stream | StreamedBatches:
    """This rank's batches, from the step on that the run goes on with."""
    share = Share(config.train.global_batch_size, config.train.micro_batch_size, ranks.rank, ranks.world)
    examples, collate, workers = prepared.examples, prepared.collate, config.data.workers
    if isinstance(examples, ExampleSet):
        order = order_of(config, examples)
        return Stream(
            examples=examples, order=order, collate=collate, share=share, workers=workers, start_step=prepared.start
        )
    cursor = Cursor.read(prepared.resumed.checkpoint.state[CURSOR]) if prepared.resumed else examples.begin
    return StreamedBatches(examples=examples, collate=collate, share=share, cursor=cursor, workers=workers)


def facts_of(batches: Stream | StreamedBatches) -> dict[str, Any]:
    """What a checkpoint keeps of the batches: where a stream stands."""
    return {CURSOR: batches.cursor.facts()} if isinstance(batches, StreamedBatches) else {}
