"""Rows tokenized once and kept on disk, shared by all ranks and later runs.

Lengths must be known before training (which examples stay, in which order), so all rows are tokenized first, by as many
processes as there are cores. The result is a folder named by a digest of the source, the tokenizer and the options,
under `HF_HOME`: `tokens.bin` (int32, document after document), `documents.npy` and `spans.npy` (where each lies), and
`told.json` (what was left out or looked odd). It is written beside and renamed, so it is there whole or not at all;
ranks that come at once wait for the first by a file lock, and where a file system has no locks they merely do the work
twice.
"""

import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from huggingface_hub.constants import HF_HOME
from rich.console import Console
from rich.progress import Progress

from ds_dgemma.data.chat import Document
from ds_dgemma.data.reading import Reading, settle
from ds_dgemma.data.rows import RowReader
from ds_dgemma.data.sources import Chunk, Split
from ds_dgemma.data.workers import map_in_order
from ds_dgemma.errors import UserError

PARALLEL_FROM = 20_000  # rows; fewer are done before worker processes are up
MAX_WORKERS = 16
DEFAULT_FOLDER = Path(HF_HOME) / "ds_dgemma" / "tokens"
TOKENS, DOCUMENTS, SPANS, TOLD = "tokens.bin", "documents.npy", "spans.npy", "told.json"
DOCUMENT = np.dtype(
    [("row", "i8"), ("start", "i8"), ("length", "i4"), ("scored_from", "i4"), ("first_span", "i8"), ("is_text", "?")]
)
SPAN = np.dtype([("start", "i4"), ("end", "i4"), ("weight", "f4"), ("number", "i4")])

log = logging.getLogger(__name__)


class Documents(Protocol):
    """Tokenized documents, in memory or on disk."""

    @property
    def documents(self) -> np.ndarray:
        """All of them, DOCUMENT."""
        ...

    @property
    def spans(self) -> np.ndarray:
        """Of all documents, SPAN."""
        ...

    @property
    def tokens(self) -> np.ndarray:
        """Of all documents, int32."""
        ...


def span_counts(held: Documents) -> np.ndarray:
    """How many spans each document has."""
    return np.diff(held.documents["first_span"], append=len(held.spans))


@dataclass(frozen=True)
class Held:
    """Documents in memory."""

    documents: np.ndarray
    spans: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class Stored:
    """Documents on disk: read from their files, whose page cache all ranks share."""

    folder: Path

    @property
    def documents(self) -> np.ndarray:
        return _table(self.folder / DOCUMENTS)

    @property
    def spans(self) -> np.ndarray:
        return _table(self.folder / SPANS)

    @property
    def tokens(self) -> np.ndarray:
        return _tokens(self.folder / TOKENS)

    @property
    def told(self) -> list[str]:
        """What a user should know of the rows."""
        return json.loads((self.folder / TOLD).read_text())


@lru_cache(maxsize=64)
def _table(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")


@lru_cache(maxsize=64)
def _tokens(path: Path) -> np.ndarray:
    return np.memmap(path, np.int32, mode="r") if path.stat().st_size else np.empty(0, np.int32)


def tokenized_rows(reader: RowReader, split: Split, shows: bool, cache: Path = DEFAULT_FOLDER) -> Stored:
    """Tokenize every row of a source, or open what an earlier call made of the same; several ranks may call.

    `shows`: with a progress bar.

    Raises:
        UserError: the rows that cannot be trained on, unless they are to be dropped; a folder without room.
    """
    folder = cache / reader.digest
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if not folder.exists():
                _write(folder, reader, split, shows)
        return Stored(folder)
    except OSError as error:
        raise UserError(
            f"the tokenized data cannot be kept in {cache}: {error.strerror or error}. "
            "Set HF_HOME to a writable folder with room."
        ) from error


def held_rows(reader: RowReader, chunk: Chunk) -> tuple[Held, Reading]:
    """Tokenize some rows of a source, and keep them in memory."""
    tokens, documents, spans, reading = _tokenize_chunk(chunk, reader)
    return Held(_with_starts(documents), spans, tokens), reading


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, which a killed process gives back."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: the rename alone keeps the result whole
            log.warning("no file locks in %s: every rank tokenizes for itself", path.parent)
        yield


def _write(folder: Path, reader: RowReader, split: Split, shows: bool) -> None:
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        documents, spans, reading = _tokenize(reader, beside / TOKENS, shows)
        told = settle([(reader.source, reading)], split, reader.data.invalid)
        for name, table in ((DOCUMENTS, _with_starts(np.concatenate(documents))), (SPANS, np.concatenate(spans))):
            with (beside / name).open("wb") as file:
                np.save(file, table)
                _sync(file)
        (beside / TOLD).write_text(json.dumps(told))
        beside.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was first, without a lock to wait for
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _with_starts(documents: np.ndarray) -> np.ndarray:
    """Documents behind one another; `first_span` held how many spans each has."""
    documents["start"] = np.cumsum(documents["length"], dtype=np.int64) - documents["length"]
    documents["first_span"] = np.cumsum(documents["first_span"]) - documents["first_span"]
    return documents


def _tokenize(reader: RowReader, path: Path, shows: bool) -> tuple[list[np.ndarray], list[np.ndarray], Reading]:
    source = reader.source
    workers = min(len(os.sched_getaffinity(0)), MAX_WORKERS) if len(source) >= PARALLEL_FROM else 0
    made = map_in_order(partial(_tokenize_chunk, reader=reader), source.chunks(), workers)
    documents, spans, reading = [np.empty(0, DOCUMENT)], [np.empty(0, SPAN)], Reading()
    console = Console(stderr=True)
    with (
        path.open("wb") as file,
        Progress(console=console, transient=True, disable=not (shows and console.is_terminal)) as progress,
    ):
        task = progress.add_task(f"tokenizing {source.name}", total=len(source))
        for tokens, document_table, span_table, read in made:
            tokens.tofile(file)
            documents.append(document_table)
            spans.append(span_table)
            reading.add(read)
            progress.advance(task, read.rows)
        _sync(file)
    return documents, spans, reading


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _tokenize_chunk(chunk: Chunk, reader: RowReader) -> tuple[np.ndarray, np.ndarray, np.ndarray, Reading]:
    """Return the chunk's tokens in one row, DOCUMENT with counts for `first_span`, SPAN, and what was read."""
    documents, reading = reader.read(chunk)
    ids = np.array([token for document in documents for token in document.ids], dtype=np.int32)
    table = [_entry(document) for document in documents]
    spans = [tuple(span) for document in documents for span in document.spans]
    return ids, np.array(table, dtype=DOCUMENT), np.array(spans, dtype=SPAN), reading


def _entry(document: Document) -> tuple[Any, ...]:
    length, spans = len(document.ids), len(document.spans)
    return document.row, 0, length, document.scored_from, spans, document.starts_anywhere
