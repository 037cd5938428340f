"""JSONL files and JSON arrays, read by our own code: a row is exactly what stands in the file.

(Arrow, which `datasets` reads JSON into, gives the objects of a column all the same keys.) A JSONL file stays on disk.
What is held of it is where every 500th row begins, found in one pass that counts newlines by numpy. Lines end at a
newline byte only: U+2028 inside a string is text. Blank lines are skipped. A `.gz` file is decompressed as it is read.
"""

import gzip
import hashlib
import json
import re
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ds_dgemma.data.messages import BadRow, kind_of
from ds_dgemma.data.reading import Reading
from ds_dgemma.data.workers import start_server
from ds_dgemma.errors import UserError, told

CHUNK = 500  # rows per piece of work
BLOCK = 2**23  # bytes read at once
LARGE = 2**25  # bytes
ARRAY_HINT = " A JSON array becomes JSONL with: jq -c '.[]'"
BLANK = b" \t\r\n\v\f"
BOM = "\ufeff"
WHITE_SPACE = re.compile(r"[ \t\n\r]*")

Record = dict[str, Any]
NumberedRows = Iterator[tuple[int, Record | BadRow]]


@dataclass(frozen=True)
class Index:
    """Where the rows of a JSONL file are."""

    rows: int
    lines: int
    starts: array  # byte of every 500th row, and the file's end
    numbers: array  # and its line, from 1
    digest: str


@dataclass(frozen=True)
class LineChunk:
    """A piece of a JSONL file; `lines` where it cannot be read from its middle."""

    path: Path
    first_row: int
    start: int
    end: int
    lines: bytes | None = None

    def rows(self, reading: Reading | None = None) -> NumberedRows:
        """Yield the rows with their numbers in the source, and note them in `reading`."""
        parse, row = _Parser(), self.first_row
        for line in (_read(self.path, self.start, self.end) if self.lines is None else self.lines).split(b"\n"):
            if line.strip(BLANK):
                yield row, parse.line(line, row, reading)
                row += 1


@dataclass(frozen=True)
class ArrayChunk:
    """Some objects of a JSON array, each with the keys that it has twice."""

    first_row: int
    items: list[tuple[Any, list[str]]]

    def rows(self, reading: Reading | None = None) -> NumberedRows:
        """Yield the rows with their numbers in the source, and note them in `reading`."""
        for row, (value, doubled) in enumerate(self.items, self.first_row):
            record = _object(value)
            if reading is not None:
                reading.saw(row, record, doubled)
            yield row, record


class JsonLines:
    """A JSONL file."""

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        self._compressed = path.suffix == ".gz"

    @cached_property
    def index(self) -> Index:
        """One pass over the file."""
        with opened(self.path, self.name) as file:
            if self.path.stat().st_size >= LARGE:
                start_server()  # of who will tokenize it: it imports while the file is scanned
            return _scan(file)

    def __len__(self) -> int:
        return self.index.rows

    count = __len__

    @property
    def digest(self) -> str:
        """Of the content."""
        return self.index.digest

    def chunks(self, first_row: int) -> Iterator[LineChunk]:
        """Pieces of about 500 rows; `first_row` is the number of the file's first row in its source."""
        starts = self.index.starts
        if not self._compressed:
            for n, (start, end) in enumerate(pairwise(starts)):
                yield LineChunk(self.path, first_row + n * CHUNK, start, end)
            return
        with opened(self.path, self.name) as file:
            file.seek(starts[0])
            for n, (start, end) in enumerate(pairwise(starts)):
                yield LineChunk(self.path, first_row + n * CHUNK, start, end, file.read(end - start))

    def stream(self, start: int) -> NumberedRows:
        """Rows from `start` on, without a pass over the file before, if it is from the begin."""
        skipped = start // CHUNK
        row = skipped * CHUNK
        if start and skipped >= len(self.index.starts) - 1:
            return
        parse = _Parser()
        with opened(self.path, self.name) as file:
            if start:
                file.seek(self.index.starts[skipped])
            for line in file:
                if line.strip(BLANK):
                    if row >= start:
                        yield row, parse.line(line, row, None)
                    row += 1

    def row(self, row: int) -> Record | BadRow:
        """Read one row again."""
        return _Parser().line(self._line(row)[1], row, None)

    def where(self, row: int) -> str:
        """Return file:line."""
        number = row + 1 if self.index.lines == self.index.rows else self._line(row)[0]
        return f"{self.name}:{number}"

    def _line(self, row: int) -> tuple[int, bytes]:
        chunk, place = divmod(row, CHUNK)
        start, end = self.index.starts[chunk : chunk + 2]
        with opened(self.path, self.name) as file:
            file.seek(start)
            lines = enumerate(file.read(end - start).split(b"\n"), self.index.numbers[chunk])
        return [(number, line) for number, line in lines if line.strip(BLANK)][place]


class JsonArray:
    """A file with one JSON array of objects. It is decoded as a whole, an object at a time is parsed."""

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name

    @cached_property
    def _rows_and_digest(self) -> tuple[int, str]:
        return sum(1 for _ in self._items()), digest_of(self.path, self.name)

    def __len__(self) -> int:
        return self._rows_and_digest[0]

    count = __len__

    @property
    def digest(self) -> str:
        """Of the content."""
        return self._rows_and_digest[1]

    def chunks(self, first_row: int) -> Iterator[ArrayChunk]:
        """Pieces of 500 rows; `first_row` is the number of the file's first row in its source."""
        items: list[tuple[Any, list[str]]] = []
        for item in self._items():
            items.append(item)
            if len(items) == CHUNK:
                yield ArrayChunk(first_row, items)
                first_row, items = first_row + CHUNK, []
        if items:
            yield ArrayChunk(first_row, items)

    def stream(self, start: int) -> NumberedRows:
        """Rows from `start` on."""
        for row, (value, _) in enumerate(self._items()):
            if row >= start:
                yield row, _object(value)

    def row(self, row: int) -> Record | BadRow:
        """Read one row again."""
        return next(record for _, record in self.stream(row))

    def where(self, row: int) -> str:
        """Say where a row is."""
        return f"{self.name} row {row}"

    def _items(self) -> Iterator[tuple[Any, list[str]]]:
        with opened(self.path, self.name) as file:
            try:
                text = file.read().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise UserError(f"{self.name}: not UTF-8: {error.reason} at byte {error.start + 1}.") from error
        try:
            yield from _Parser().array(text)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{self.name}: broken JSON: {error}. Mend the file: nothing behind it can be read."
            ) from error


def opens_an_array(path: Path, name: str) -> bool:
    """Whether the file's first character is a bracket."""
    with opened(path, name) as file:
        return file.read(2**16).removeprefix(b"\xef\xbb\xbf").lstrip(BLANK).startswith(b"[")


@contextmanager
def opened(path: Path, name: str) -> Iterator[BufferedReader | gzip.GzipFile]:
    """Open a file, `.gz` or not; what the system says against it becomes a `UserError`."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {name}: {told(error)}.") from error


def digest_of(path: Path, name: str) -> str:
    """A digest of a file's content."""
    digest = hashlib.blake2b(digest_size=16)
    with opened(path, name) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _read(path: Path, start: int, end: int) -> bytes:
    with opened(path, str(path)) as file:
        file.seek(start)
        data = file.read(end - start)
    if len(data) < end - start:
        raise UserError(f"{path} became shorter while it was read. Leave it as it is, and start again.")
    return data


def _scan(file: BufferedReader | gzip.GzipFile) -> Index:
    """Find every 500th row, block by block."""
    starts, numbers, digest = array("q"), array("q"), hashlib.blake2b(digest_size=16)
    rows = lines = offset = 0
    rest = b""
    while block := file.read(BLOCK):
        digest.update(block)
        cut = block.rfind(b"\n") + 1
        if not cut:
            rest += block
            continue
        whole, rest = rest + block[:cut], block[cut:]
        rows, lines = _note_rows(whole, offset, rows, lines, starts, numbers)
        offset += len(whole)
    if rest:
        rows, lines = _note_rows(rest, offset, rows, lines, starts, numbers)
    starts.append(offset + len(rest))
    return Index(rows, lines, starts, numbers, digest.hexdigest())


def _note_rows(data: bytes, offset: int, rows: int, lines: int, starts: array, numbers: array) -> tuple[int, int]:
    """Note every 500th row of whole lines; return the rows and lines that there are now."""
    codes = np.frombuffer(data, np.uint8)
    begins = np.concatenate([[0], np.flatnonzero(codes == ord("\n")) + 1])
    if begins[-1] < len(data):
        begins = np.append(begins, len(data))
    full = np.ones(len(begins) - 1, bool)
    for n in np.flatnonzero(codes[begins[:-1]] <= ord(" ")):  # few lines begin with white space
        full[n] = bool(data[begins[n] : begins[n + 1]].strip(BLANK))
    places = np.flatnonzero(full)
    chosen = places[-rows % CHUNK :: CHUNK]
    starts.extend((offset + begins[chosen]).tolist())
    numbers.extend((lines + 1 + chosen).tolist())
    return rows + len(places), lines + len(full)


class _Parser:
    """A JSON decoder that notices keys which an object has twice: with one value, told; with two, a bad row, for one of
    them would be lost.
    """

    def __init__(self) -> None:
        self._doubled: list[str] = []
        self._lost: str | None = None
        self._decoder = json.JSONDecoder(object_pairs_hook=self._pairs)

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs):
            keys = [key for key, _ in pairs]
            self._doubled.append(next(key for key in keys if keys.count(key) > 1))
            self._lost = self._lost or next((key for key, value in pairs if value != record[key]), None)
        return record

    def _begin(self) -> None:
        self._doubled.clear()
        self._lost = None

    def _whole(self, value: Any) -> Any:
        """A value; a bad row where a part of it was lost."""
        if self._lost is None:
            return value
        return BadRow(f"key {self._lost!r} stands twice in an object, with two values: take one of them out.")

    def line(self, line: bytes, row: int, reading: Reading | None) -> Record | BadRow:
        """Parse a line, and note it in `reading`."""
        self._begin()
        try:
            record = _object(self._whole(self._decode(line)))
        except BadRow as problem:
            record = problem
        if reading is not None:
            reading.saw(row, record, self._doubled)
        return record

    def _decode(self, line: bytes) -> Any:
        if b"\0" in line:
            raise BadRow(f"a NUL byte at byte {line.index(0) + 1} of the line: the file is damaged or binary.")
        try:
            return self._decoder.decode(line.decode().removeprefix(BOM))
        except UnicodeDecodeError as error:
            raise BadRow(f"not UTF-8: {error.reason} at byte {error.start + 1} of the line.") from error
        except json.JSONDecodeError as error:
            near = error.doc[max(0, error.pos - 20) : error.pos + 20].strip()
            hint = ARRAY_HINT if error.doc.lstrip().startswith("[") else ""
            raise BadRow(f"broken JSON: {error.msg} at column {error.colno}: {near!r}.{hint}") from error
        except (ValueError, RecursionError) as error:  # an endless number, a thousand nested lists
            raise BadRow(f"broken JSON: {error}") from error

    def array(self, text: str) -> Iterator[tuple[Any, list[str]]]:
        """Yield the items of an array, each with the keys that an object of it has twice."""
        place = _skip(text, _skip(text, 0) + 1)
        while not text.startswith("]", place):
            self._begin()
            item, place = self._decoder.raw_decode(text, place)
            yield self._whole(item), self._doubled.copy()
            place = _skip(text, place)
            if text.startswith(",", place):
                place = _skip(text, place + 1)
            elif not text.startswith("]", place):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
        if _skip(text, place + 1) < len(text):
            raise json.JSONDecodeError("Extra data", text, place + 1)


def _skip(text: str, place: int) -> int:
    return WHITE_SPACE.match(text, place).end()  # type: ignore[union-attr]  # it may be empty


def _object(value: Any) -> Record | BadRow:
    if isinstance(value, dict | BadRow):
        return value
    hint = f". {ARRAY_HINT.strip()}" if isinstance(value, list) else "."
    return BadRow(f"{kind_of(value)}, expected an object with messages{hint}")
