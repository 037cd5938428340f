"""Everything that is checked and read before the first weight."""

import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ds_dgemma.checkpoint.pretrained import open_pretrained
from ds_dgemma.checkpoint.retention import Scores
from ds_dgemma.checkpoint.run_state import StateReader, check_same_model
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
from ds_dgemma.run.directory import Start, check_same_data, check_same_optimizer
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
    resumed, warnings = start.resumed, list(start.warnings)
    if config.optimizer.warmup_steps >= config.train.max_steps:
        warnings.append("optimizer.warmup_steps is not below train.max_steps: the run ends before lr is reached.")
    pretrained = open_pretrained(config.model.path, config.model.revision, download=False)
    spec, tokenizer = pretrained.spec, pretrained.tokenizer
    model = outline_run(config, pretrained, ranks, resumed is not None)
    attention, dropped = choose_kernels(config, spec, ranks.device)
    warnings += dropped
    if resumed:
        check_same_model(config.model.path, pretrained.digest, resumed.checkpoint)
        check_same_optimizer(config.optimizer.type, resumed.checkpoint)
        resumed.check_fits(model.trained_sizes(ranks))
    check_trained(config, settings["zero_optimization"]["stage"], model.trained_names(), model.reader.files)
    if model.adapters and (warning := model.adapters.base_warning(config.model.path)):
        warnings.append(warning)

    images = pretrained.images(config.data)
    told, held_out, measured_on = [], [], None
    if config.data.streaming:
        examples = open_stream(config, spec, tokenizer, ranks.is_main)
        told.append(f"train: {len(examples.readers)} sources are read while training")
    else:
        examples = read_split(config, "train", spec, tokenizer, ranks.is_main)
        told += tell("train", examples)
    if config.validation.every:
        validation = read_split(config, "validation", spec, tokenizer, ranks.is_main)
        told += tell("validation", validation)
        held_out = [validation[i] for i in range(min(len(validation), config.validation.examples))]
        measured_on = f"{validation.digest} {len(held_out)} {config.validation.noise_levels}"
    exam, best_by = None, config.checkpoint.best_by
    if config.evaluation.every:
        exam = Exam.of(config, pretrained.directory, tokenizer, images)
        if best_by.startswith("evaluation/"):
            exam.check_measure(best_by)
            measured_on = exam.digest
    corruption = Corruption(config.objective, config.seed, pretrained.text.vocab_size)
    build_cpu_adam(settings)
    if ranks.is_main:
        print("\n".join(told), flush=True)
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        if resumed:
            print(f"continuing from {resumed.checkpoint.path}", flush=True)
    facts = {
        "model": config.model.path,
        "model_digest": pretrained.digest,
        "optimizer": config.optimizer.type,
        "data_digest": examples.digest,
        "examples": len(examples) if isinstance(examples, ExampleSet) else 0,
    }
    if resumed:
        check_same_data(config.data.named("train"), resumed.checkpoint, facts["data_digest"], facts["examples"])
    scores = Scores.continued(best_by, measured_on, resumed.checkpoint if resumed else None)
    make_batch = partial(collate, corruption, images=images)
    return Prepared(settings, model, attention, make_batch, images, examples, held_out, exam, scores, resumed, facts)


def tell(split: str, examples: ExampleSet) -> list[str]:
    """What became of the rows of a split, a line for each source and for what a user should know of it."""
    named = [f"{split}: {source.source.name}: {source.report}" for source in examples.sources]
    if len(named) == 1:
        named = [f"{split}: {examples.sources[0].report}"]
    return [*named, *(f"{split}: {line}" for line in examples.told)]


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
