"""Rows tokenized once and kept on disk, shared by all ranks and later runs.

Lengths must be known before training (which examples stay, in which order), so all rows are tokenized first, by as many
processes as there are cores. The result is a folder named by a digest of the source, the tokenizer and the options,
under `HF_HOME`: `tokens.bin` (int32, document after document), `documents.npy` and `spans.npy` (where each lies), and
`reading.json` (what was left out). It is written beside and renamed, so it is there whole or not at all; ranks that
come at once wait for the first by a file lock, and where a file system has no locks they merely do the work twice.
"""

import fcntl
import hashlib
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
from typing import Any, BinaryIO

import numpy as np
import transformers
from huggingface_hub.constants import HF_HOME
from rich.console import Console
from rich.progress import track

from ds_dgemma.data.batch import Span
from ds_dgemma.data.chat import Document
from ds_dgemma.data.rows import RowReader
from ds_dgemma.data.sources import Chunk, Reading, Source
from ds_dgemma.data.workers import map_in_order
from ds_dgemma.errors import UserError

FORMAT = 2  # raise it when what is stored changes
PARALLEL_FROM = 20_000  # rows; fewer are done before worker processes are up
MAX_WORKERS = 16
DEFAULT_FOLDER = Path(HF_HOME) / "ds_dgemma" / "tokens"
TOKENS, DOCUMENTS, SPANS, READING = "tokens.bin", "documents.npy", "spans.npy", "reading.json"
DOCUMENT = np.dtype(
    [("row", "i8"), ("start", "i8"), ("length", "i4"), ("scored_from", "i4"), ("first_span", "i8"), ("is_text", "?")]
)
SPAN = np.dtype([("start", "i4"), ("end", "i4"), ("weight", "f4"), ("number", "i4")])

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizedRows:
    """Where each document's tokens are; they are read from the file, whose page cache all ranks share."""

    folder: Path
    reading: Reading

    @property
    def documents(self) -> np.ndarray:
        """All of them, DOCUMENT."""
        return _table(self.folder / DOCUMENTS)

    @property
    def spans(self) -> np.ndarray:
        """Of all documents, SPAN."""
        return _table(self.folder / SPANS)

    @property
    def tokens(self) -> np.ndarray:
        """Of all documents, int32."""
        return _tokens(self.folder / TOKENS)

    @property
    def span_counts(self) -> np.ndarray:
        """How many spans each document has."""
        return np.diff(self.documents["first_span"], append=len(self.spans))

    def spans_of(self, number: int) -> list[Span]:
        """A document's spans."""
        first, end = (int(self.documents[i]["first_span"]) if i < len(self.documents) else None for i in (number, number + 1))
        return [Span(*span.tolist()) for span in self.spans[first:end]]

    def ids(self, number: int) -> np.ndarray:
        """A document's tokens."""
        document = self.documents[number]
        return self.tokens[int(document["start"]) :][: int(document["length"])]


@lru_cache(maxsize=64)
def _table(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")


@lru_cache(maxsize=64)
def _tokens(path: Path) -> np.ndarray:
    return np.memmap(path, np.int32, mode="r") if path.stat().st_size else np.empty(0, np.int32)


def tokenized_rows(source: Source, reader: RowReader, shows: bool, cache: Path = DEFAULT_FOLDER) -> TokenizedRows:
    """Tokenize every row of a source, or open what an earlier call made of the same; several ranks may call.

    `shows`: with a progress bar.

    Raises:
        UserError: the rows that cannot be trained on, unless they are to be dropped; a folder without room.
    """
    folder = cache / _digest(source, reader)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if not folder.exists():
                _write(folder, source, reader, shows)
        return TokenizedRows(folder, Reading.from_json(json.loads((folder / READING).read_text())))
    except OSError as error:
        raise UserError(
            f"the tokenized data cannot be kept in {cache}: {error.strerror or error}. "
            "Set HF_HOME to a writable folder with room."
        ) from error


def _digest(source: Source, reader: RowReader) -> str:
    parts = [FORMAT, transformers.__version__, source.digest, reader.key]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, which a killed process gives back."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: the rename alone keeps the result whole
            log.warning("no file locks in %s: every rank tokenizes for itself", path.parent)
        yield


def _write(folder: Path, source: Source, reader: RowReader, shows: bool) -> None:
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        documents, spans, reading = _tokenize(source, reader, beside / TOKENS, shows)
        reading.raise_if_bad()
        for name, parts, dtype in ((DOCUMENTS, documents, DOCUMENT), (SPANS, spans, SPAN)):
            table = np.concatenate([np.empty(0, dtype), *parts])
            if name == DOCUMENTS:
                table["start"] = np.cumsum(table["length"], dtype=np.int64) - table["length"]
                table["first_span"] = np.cumsum(table["first_span"]) - table["first_span"]  # of counts
            with (beside / name).open("wb") as file:
                np.save(file, table)
                _sync(file)
        (beside / READING).write_text(json.dumps(reading.to_json()))
        beside.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was first, without a lock to wait for
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _tokenize(
    source: Source, reader: RowReader, path: Path, shows: bool
) -> tuple[list[np.ndarray], list[np.ndarray], Reading]:
    workers = min(len(os.sched_getaffinity(0)), MAX_WORKERS) if len(source) >= PARALLEL_FROM else 0
    made = map_in_order(partial(_tokenize_chunk, reader=reader), source.chunks(), workers)
    console = Console(stderr=True)
    shown = track(
        made,
        f"tokenizing {source.name}",
        total=source.chunk_count,
        console=console,
        transient=True,
        disable=not (shows and console.is_terminal),
    )
    documents, spans, reading = [], [], Reading(source.name)
    with path.open("wb") as file:
        for tokens, document_table, span_table, read in shown:
            tokens.tofile(file)
            documents.append(document_table)
            spans.append(span_table)
            reading.add(read)
        _sync(file)
    return documents, spans, reading


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _tokenize_chunk(chunk: Chunk, reader: RowReader) -> tuple[np.ndarray, np.ndarray, np.ndarray, Reading]:
    """Return the chunk's tokens in one row, DOCUMENT with counts for `first_span`, SPAN, and what was read."""
    documents, reading = reader.read(chunk.rows())
    ids = np.array([token for document in documents for token in document.ids], dtype=np.int32)
    table = [_entry(document) for document in documents]
    spans = [tuple(span) for document in documents for span in document.spans]
    return ids, np.array(table, dtype=DOCUMENT), np.array(spans, dtype=SPAN), reading


def _entry(document: Document) -> tuple[Any, ...]:
    length, spans = len(document.ids), len(document.spans)
    return document.row, 0, length, document.scored_from, spans, document.starts_anywhere
