"""Rows tokenized once and kept on disk, shared by all ranks and later runs.

Lengths must be known before training (which examples stay, in which order), so all rows are tokenized first, by as many
processes as there are cores. The result is a folder named by a digest of the source, the tokenizer and the options,
under `HF_HOME`: `tokens.bin` (int32, document after document), `documents.npy` and `spans.npy` (where each lies), and
`told.json` (what was left out or looked odd). It is written beside and renamed, so it is there whole or not at all;
ranks that come at once wait for the first by a file lock, and where a file system has no locks they merely do the work
twice.
"""

import gc
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from huggingface_hub.constants import HF_HOME
from rich.console import Console
from rich.progress import Progress

from ds_dgemma.data.batch import Image
from ds_dgemma.data.chat import Document
from ds_dgemma.data.findings import settle
from ds_dgemma.data.reading import Reading
from ds_dgemma.data.rows import RowReader
from ds_dgemma.data.sources import Chunk, Source, Split
from ds_dgemma.data.workers import map_in_order
from ds_dgemma.errors import UserError
from ds_dgemma.files import lock

PARALLEL_FROM = 20_000  # rows; fewer are done before worker processes are up
MAX_WORKERS = 16
DEFAULT_FOLDER = Path(HF_HOME) / "ds_dgemma" / "tokens"
TOKENS, DOCUMENTS, SPANS, IMAGES, NAMES = "tokens.bin", "documents.npy", "spans.npy", "images.npy", "names.npy"
TOLD, FOLDERS = "told.json", "folders.txt"
FILES = (TOKENS, DOCUMENTS, SPANS, IMAGES, NAMES, TOLD, FOLDERS)
DOCUMENT = np.dtype(
    [
        ("row", "i8"),
        ("start", "i8"),
        ("length", "i4"),
        ("scored_from", "i4"),
        ("first_span", "i8"),
        ("is_text", "?"),
        ("first_image", "i8"),
    ]
)
IMAGE = np.dtype(
    [
        *(("start", "i4"), ("tokens", "i4"), ("digest", "S64")),
        *(("name_start", "i8"), ("name_length", "i4"), ("size", "i8"), ("changed", "i8")),  # of its file
    ]
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

    @property
    def images(self) -> np.ndarray:
        """Of all documents, IMAGE."""
        ...

    @property
    def names(self) -> np.ndarray:
        """The names of the images' files, one behind another, uint8."""
        ...


def images_of(held: Documents, document: int) -> tuple[Image, ...]:
    """The images of a document."""
    if not len(held.images):
        return ()
    first = int(held.documents[document]["first_image"])
    last = document + 1 == len(held.documents)
    end = len(held.images) if last else int(held.documents[document + 1]["first_image"])
    return tuple(_image(held, entry) for entry in held.images[first:end])


def _image(held: Documents, entry: np.void) -> Image:
    return Image(int(entry["start"]), int(entry["tokens"]), _name(held, entry), entry["digest"].decode())


def _name(held: Documents, entry: np.void) -> str:
    start = int(entry["name_start"])
    return os.fsdecode(held.names[start : start + int(entry["name_length"])].tobytes())


def span_counts(held: Documents) -> np.ndarray:
    """How many spans each document has."""
    return np.diff(held.documents["first_span"], append=len(held.spans))


@dataclass(frozen=True)
class Held:
    """Documents in memory."""

    documents: np.ndarray
    spans: np.ndarray
    tokens: np.ndarray
    images: np.ndarray
    names: np.ndarray


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
    def images(self) -> np.ndarray:
        return _table(self.folder / IMAGES)

    @property
    def names(self) -> np.ndarray:
        return _table(self.folder / NAMES)

    def told(self, source: Source) -> list[str]:
        """What a user should know of the rows; the same files may have other names by now."""
        lines: list[str] = json.loads((self.folder / TOLD).read_text())
        for number, name in enumerate(_names(source)):
            lines = [line.replace(_place(number), name) for line in lines]
        return lines


@lru_cache(maxsize=64)
def _table(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")


@lru_cache(maxsize=64)
def _tokens(path: Path) -> np.ndarray:
    return np.memmap(path, np.int32, mode="r") if path.stat().st_size else np.empty(0, np.int32)


def _names(source: Source) -> list[str]:
    return [source.name, *(part.name for part in source.parts)]


def _place(number: int) -> str:
    """What stands for a name on disk."""
    return f"\0{number}\0"


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
            if folder.exists() and not _as_they_were(Stored(folder), reader):
                shutil.rmtree(folder)
                _table.cache_clear()  # what is mapped of it
                _tokens.cache_clear()
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
    made, reading = _tokenize_chunk(chunk, reader)
    return _together([made]), reading


def _as_they_were(stored: Stored, reader: RowReader) -> bool:
    """Whether all files are there, and all images where the rows have them from, as large and as old as they were."""
    if not all((stored.folder / name).exists() for name in FILES):
        return False  # cleaned in part, or of another version
    if len(stored.images) and (stored.folder / FOLDERS).read_text() != reader.source.folders:
        return False  # the same rows in another folder
    return all((entry["size"], entry["changed"]) == _stamp(_name(stored, entry)) for entry in stored.images)


def _stamp(file: str) -> tuple[int, int]:
    try:
        status = os.stat(file)
    except OSError:
        return (-1, -1)
    return status.st_size, status.st_mtime_ns


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, which a killed process gives back."""
    with path.open("w") as file:
        if not lock(file, wait=True):  # the rename alone keeps the result whole
            log.warning("no file locks in %s: every rank tokenizes for itself", path.parent)
        yield


def _write(folder: Path, reader: RowReader, split: Split, shows: bool) -> None:
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        pieces, reading = _tokenize(reader, beside / TOKENS, shows)
        told = settle([(reader.source, reading)], split, reader.data.invalid)
        made = _together(pieces)
        tables = {DOCUMENTS: made.documents, SPANS: made.spans, IMAGES: made.images, NAMES: made.names}
        for name, table in tables.items():
            with (beside / name).open("wb") as file:
                np.save(file, table)
                _sync(file)
        for number, name in sorted(enumerate(_names(reader.source)), key=lambda one: -len(one[1])):
            told = [line.replace(name, _place(number)) for line in told]
        (beside / TOLD).write_text(json.dumps(told))
        (beside / FOLDERS).write_text(reader.source.folders)
        beside.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was first, without a lock to wait for
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _together(pieces: list[Held]) -> Held:
    """Documents behind one another; `first_span` and `first_image` held how many each has."""
    documents, spans, tokens, images, names = (
        np.concatenate([getattr(piece, name) for piece in pieces])
        for name in ("documents", "spans", "tokens", "images", "names")
    )
    for begin, size in (("start", "length"), ("first_span", "first_span"), ("first_image", "first_image")):
        documents[begin] = np.cumsum(documents[size], dtype=np.int64) - documents[size]
    images["name_start"] = np.cumsum(images["name_length"], dtype=np.int64) - images["name_length"]
    return Held(documents, spans, tokens, images, names)


def _tokenize(reader: RowReader, path: Path, shows: bool) -> tuple[list[Held], Reading]:
    source = reader.source
    workers = min(len(os.sched_getaffinity(0)), MAX_WORKERS) if len(source) >= PARALLEL_FROM else 0
    made = map_in_order(partial(_tokenize_chunk, reader=reader), source.chunks(), workers)
    no_tokens = np.empty(0, np.int32)
    pieces, reading = [_held([], no_tokens)], Reading()
    console = Console(stderr=True)
    with (
        path.open("wb") as file,
        Progress(console=console, transient=True, disable=not (shows and console.is_terminal)) as progress,
    ):
        task = progress.add_task(f"tokenizing {source.name}", total=len(source))
        for piece, read in made:
            piece.tokens.tofile(file)
            pieces.append(replace(piece, tokens=no_tokens))
            reading.add(read)
            progress.advance(task, read.rows)
        _sync(file)
    return pieces, reading


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _tokenize_chunk(chunk: Chunk, reader: RowReader) -> tuple[Held, Reading]:
    """The chunk's documents, with counts for `first_span` and `first_image`, and what was read."""
    with _without_collector():
        documents, reading = reader.read(chunk)
        count = sum(len(document.ids) for document in documents)
        ids = np.fromiter(chain.from_iterable(document.ids for document in documents), np.int32, count)
        return _held(documents, ids), reading


@contextmanager
def _without_collector() -> Iterator[None]:
    """Python's collector of cycles would look through a chunk's objects again and again, a fifth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _held(documents: list[Document], ids: np.ndarray) -> Held:
    table = [_entry(document) for document in documents]
    spans = [tuple(span) for document in documents for span in document.spans]
    images = [image for document in documents for image in document.images]
    names = [os.fsencode(image.file) for image in images]
    entries = [
        (image.start, image.tokens, image.digest.encode(), 0, len(name), *_stamp(image.file))
        for image, name in zip(images, names, strict=True)
    ]
    return Held(
        documents=np.array(table, dtype=DOCUMENT),
        spans=np.array(spans, dtype=SPAN),
        tokens=ids,
        images=np.array(entries, dtype=IMAGE),
        names=np.frombuffer(b"".join(names), np.uint8),
    )


def _entry(document: Document) -> tuple[Any, ...]:
    length, spans, images = len(document.ids), len(document.spans), len(document.images)
    return document.row, 0, length, document.scored_from, spans, document.starts_anywhere, images
