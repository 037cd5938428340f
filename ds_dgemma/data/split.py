"""A split of a run's data: its rows checked, tokenized and cut into examples, or about to be, while it trains."""

from pathlib import Path

from transformers import DiffusionGemmaConfig, PreTrainedTokenizerFast

from ds_dgemma.config.run import RunConfig
from ds_dgemma.data.canvas import Cut
from ds_dgemma.data.examples import ExampleSet, examples_of
from ds_dgemma.data.image_files import image_files
from ds_dgemma.data.order import Arrangement, Order
from ds_dgemma.data.rows import RowReader
from ds_dgemma.data.sources import Split, open_sources
from ds_dgemma.data.streaming import StreamedExamples
from ds_dgemma.data.token_cache import DEFAULT_FOLDER, tokenized_rows
from ds_dgemma.errors import UserError


def open_readers(
    config: RunConfig, split: Split, spec: DiffusionGemmaConfig, tokenizer: PreTrainedTokenizerFast
) -> tuple[tuple[RowReader, ...], Cut]:
    """The sources of a split, and how examples are cut of their rows.

    Raises:
        UserError: a source is missing, or cannot be read.
    """
    canvas_length, eos_id, data = spec.canvas_length, tokenizer.eos_token_id, config.data
    assert isinstance(canvas_length, int)
    assert isinstance(eos_id, int)
    images = image_files(tokenizer, spec, data)
    readers = tuple(RowReader(source, tokenizer, data, images) for source in open_sources(data, split))
    return readers, Cut(data.max_length, data.over_length, canvas_length, eos_id, config.objective.ar_tokens)


def read_split(
    config: RunConfig,
    split: Split,
    spec: DiffusionGemmaConfig,
    tokenizer: PreTrainedTokenizerFast,
    shows: bool = False,
    cache: Path = DEFAULT_FOLDER,
) -> ExampleSet:
    """The examples of a split, all rows read; `shows`: with a progress bar.

    Raises:
        UserError: all that is wrong with the data.
    """
    readers, cut = open_readers(config, split, spec, tokenizer)
    stored = [tokenized_rows(reader, split, shows, cache) for reader in readers]
    told = [line for reader, rows in zip(readers, stored, strict=True) for line in rows.told(reader.source)]
    examples = tuple(
        examples_of(reader.source, number, rows, cut)
        for number, (reader, rows) in enumerate(zip(readers, stored, strict=True))
    )
    for source in examples:
        if not len(source):
            raise UserError(
                f"{source.source.name}: no example fits data.max_length {cut.max_length}; the shortest takes "
                f"{source.shortest} tokens with canvases of {cut.canvas_length}. Raise data.max_length."
            )
    return ExampleSet(examples, tuple(told))


def arrangement_of(config: RunConfig) -> Arrangement:
    """How examples are put into the rows of a batch."""
    data = config.data
    group = config.train.global_batch_size if data.group_by_length else 0
    return Arrangement(config.seed, data.max_length if data.packing else None, group)


def order_of(config: RunConfig, examples: ExampleSet) -> Order:
    """The order in which examples are trained on."""
    weights = tuple(source.source.weight for source in examples.sources)
    return Order(
        config.seed, examples.lengths_N, examples.sizes, weights, arrangement_of(config), config.data.shuffle_buffer
    )


def read_training(
    config: RunConfig, spec: DiffusionGemmaConfig, tokenizer: PreTrainedTokenizerFast, shows: bool
) -> ExampleSet | StreamedExamples:
    """The training examples, all read, or to be read while training; `shows`: with a progress bar, or of rows that are
    dropped on the way.
    """
    if not config.data.streaming:
        return read_split(config, "train", spec, tokenizer, shows)
    readers, cut = open_readers(config, "train", spec, tokenizer)
    return StreamedExamples(readers, cut, arrangement_of(config), config.seed, config.data.shuffle_buffer, shows)
