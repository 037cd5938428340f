"""`ds-dgemma inspect`: everything of a config's data that can be seen without the model's weights."""

import json
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path

from rich.console import Console

from ds_dgemma.checkpoint.pretrained import open_pretrained
from ds_dgemma.config.run import RunConfig
from ds_dgemma.data.sources import Split
from ds_dgemma.data.split import arrangement_of, read_split
from ds_dgemma.errors import UserError
from ds_dgemma.inspection.console import show
from ds_dgemma.inspection.page import write_page
from ds_dgemma.inspection.sequences import Sequence, sequences
from ds_dgemma.inspection.summary import padding_share, summarise
from ds_dgemma.objective.corruption import Corruption

SHOWN = 3


def inspect(
    config: RunConfig, split: Split, rows: int | None, page: Path | None, out: Path | None, console: Console
) -> None:
    """Print what the model will see of `rows` sequences (3), and write them as HTML or, all when `rows` is None, as
    JSON, an object a line.

    Raises:
        UserError: all that is wrong with the data; a file that cannot be written.
    """
    model = open_pretrained(config.model.path, config.model.revision, download=False)
    examples = read_split(config, split, model.spec, model.tokenizer, shows=True)
    corruption = Corruption(config.objective, config.seed, model.text.vocab_size)

    told = [f"{split}: {line}" for line in examples.told]
    share = padding_share(examples.lengths_N, arrangement_of(config), config.train.micro_batch_size)
    kind = "packed" if config.data.packing else f"of {config.train.micro_batch_size}"
    told.append(f"{split}: rows {kind}, padded, would hold {share:.1%} padding; batches hold none")
    summaries = [summarise(source, model.tokenizer) for source in examples.sources]
    seen = sequences(examples, corruption, model.tokenizer)
    shown = list(islice(seen, SHOWN if rows is None else rows))
    show(console, summaries, shown, told)
    try:
        if page is not None:
            write_page(page, summaries, shown, told)
        if out is not None:
            _write_lines(out, shown if rows is not None else chain(shown, seen))
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}. Name another file.") from error


def _write_lines(path: Path, found: Iterable[Sequence]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for sequence in found:
            file.write(json.dumps(sequence.as_dict(), ensure_ascii=False) + "\n")
