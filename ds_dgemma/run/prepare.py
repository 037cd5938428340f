"""Everything that is checked and read before the first weight."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from ds_dgemma.checkpoint.pretrained import Pretrained
from ds_dgemma.checkpoint.retention import Scores
from ds_dgemma.checkpoint.run_directory import Start
from ds_dgemma.checkpoint.run_state import StateReader
from ds_dgemma.checkpoint.same import check_same_data, check_same_model, check_same_optimizer
from ds_dgemma.config.faults import doubts
from ds_dgemma.config.run import RunConfig
from ds_dgemma.data.batch import Batch, Example
from ds_dgemma.data.examples import ExampleSet
from ds_dgemma.data.image_files import ImageFiles
from ds_dgemma.data.split import order_of, read_split, read_training
from ds_dgemma.data.stream import Share, Stream
from ds_dgemma.data.streaming import Cursor, StreamedBatches, StreamedExamples
from ds_dgemma.engine.ds_config import DTYPES
from ds_dgemma.evaluation.exam import Exam
from ds_dgemma.model.kernel_choice import choose_kernels
from ds_dgemma.model.trainable import check_trained
from ds_dgemma.objective.collate import collate
from ds_dgemma.objective.corruption import Corruption
from ds_dgemma.ranks.layout import RankLayout
from ds_dgemma.run.open_model import OutlinedModel, outline_run

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
    told: Sequence[str]  # of the data, a line each
    warnings: Sequence[str]

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


def prepare(
    config: RunConfig, deepspeed: dict[str, Any], ranks: RankLayout, pretrained: Pretrained, start: Start
) -> Prepared:
    """Check everything else that a user can get wrong; no collective, no weights.

    Raises:
        UserError: what is wrong, and what to do about it.
    """
    resumed = start.resumed
    model = outline_run(config, pretrained, ranks, resumed is not None)
    if resumed:
        check_same_model(config.model.path, pretrained.digest, resumed.checkpoint)
        check_same_optimizer(config.optimizer.type, resumed.checkpoint)
        resumed.check_fits(model.trained_sizes)
    images = pretrained.images(config.data)
    check_trained(config, deepspeed["zero_optimization"]["stage"], model.trained_names, model.reader.files)
    dtype = DTYPES[config.train.precision]
    kernels = choose_kernels(config.model.attention, pretrained.spec, ranks.device, dtype)
    warnings = [*doubts(config, pretrained.text.max_position_embeddings)]
    if model.adapters and (warning := model.adapters.base_warning(config.model.path)):
        warnings.append(warning)
    measures = _read_measures(config, pretrained, images, ranks)
    examples = read_training(config, pretrained.spec, pretrained.tokenizer, ranks.is_main)
    facts = {
        "model": config.model.path,
        "model_digest": pretrained.digest,
        "optimizer": config.optimizer.type,
        "data_digest": examples.digest,
        "examples": len(examples) if isinstance(examples, ExampleSet) else 0,
    }
    told = [*examples.report("train"), *measures.told]
    if resumed:
        told.append(f"continuing from {resumed.checkpoint.path}")
        check_same_data(config.data.named("train"), resumed.checkpoint, facts["data_digest"], facts["examples"])
    corruption = Corruption(config.objective, config.seed, pretrained.text.vocab_size)
    return Prepared(
        deepspeed=deepspeed,
        model=model,
        attention={kind: choice.kernel.name for kind, choice in sorted(kernels.items())},
        collate=partial(collate, corruption, images=images),
        images=images,
        examples=examples,
        held_out=measures.held_out,
        exam=measures.exam,
        scores=Scores.continued(config.checkpoint.best_by, measures.digest, resumed.checkpoint if resumed else None),
        resumed=resumed,
        facts=facts,
        told=told,
        warnings=[*warnings, *(line for choice in kernels.values() for line in choice.dropped)],
    )


class _Measures(NamedTuple):
    """What the model is measured on while it trains."""

    held_out: list[Example]
    exam: Exam | None
    digest: str | None  # of what `checkpoint.best_by` is measured on
    told: list[str]


def _read_measures(config: RunConfig, model: Pretrained, images: ImageFiles, ranks: RankLayout) -> _Measures:
    held_out, exam, digest, told = [], None, None, []
    by_exam = config.checkpoint.best_by.startswith("evaluation/")
    if config.evaluation.every:
        exam = Exam.of(config, model.directory, model.tokenizer, images)
        if by_exam:
            exam.check_measure(config.checkpoint.best_by)
            digest = exam.digest
    if config.validation.every:
        validation = read_split(config, "validation", model.spec, model.tokenizer, ranks.is_main)
        told = validation.report("validation")
        held_out = [validation[i] for i in range(min(len(validation), config.validation.examples))]
        if not by_exam:
            digest = f"{validation.digest} {len(held_out)} {config.validation.noise_levels}"
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
