"""Where rows come from: `data.train` or `data.validation`, an entry or a list of them.

An entry is a file (JSONL, JSON, CSV, TSV, Parquet; each also `.gz`), a folder of such files, a glob, or a hub dataset.
Its rows are numbered from 0 through all its files. They are read in pieces of work that travel to other processes
(`chunks`), one after another without a look at the whole (`stream`), or singly (`row`).
"""

import glob
import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Protocol

from ds_dgemma.config.data import DataSection, Learn, SourceSection
from ds_dgemma.data.formats import Conversation, Layout, Text, read_row
from ds_dgemma.data.json_files import JsonArray, JsonLines, NumberedRows, opens_an_array
from ds_dgemma.data.marks import foreign_marks, image_marks, may_have_marks
from ds_dgemma.data.messages import BadRow, names_within
from ds_dgemma.data.pictures import placed_in
from ds_dgemma.data.reading import Reading
from ds_dgemma.data.tables import csv_file, hub_dataset, parquet_file, saved_dataset
from ds_dgemma.errors import UserError, did_you_mean, told

Split = Literal["train", "validation"]
KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
SUFFIXES = tuple(kind + packed for kind in KINDS for packed in ("", ".gz"))
SAVED = ("state.json", "dataset_info.json")  # what `Dataset.save_to_disk` writes beside its Arrow files
SEVERAL_SAVED = "dataset_dict.json"  # and `DatasetDict.save_to_disk`
NO_DATA = (*SAVED, "dataset_infos.json", SEVERAL_SAVED)
# A split as datasets' own shards are named, train-00000-of-00002.parquet, or a file for each
SPLIT = re.compile(r"^(train|training|test|testing|validation|valid|val|dev|eval)(?=[-.])")


class Chunk(Protocol):
    """A piece of work of about 500 rows, which can be pickled."""

    def rows(self, reading: Reading | None = None) -> NumberedRows:
        """Yield the rows with their numbers in the source, and note them in `reading`."""
        ...


class Part(Protocol):
    """A file, or a hub dataset; rows are numbered from its own begin."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path | None: ...
    @property
    def digest(self) -> str: ...
    def __len__(self) -> int: ...
    def count(self) -> int:
        """Its length, found without keeping it on disk."""
        ...

    def chunks(self, first_row: int) -> Iterator[Chunk]: ...
    def stream(self, start: int) -> NumberedRows: ...
    def row(self, row: int) -> dict[str, Any] | BadRow: ...
    def where(self, row: int) -> str: ...


@dataclass(frozen=True)
class Source:
    """One entry of `data.train` or `data.validation`, and what it says itself of its rows."""

    name: str  # as the config spells it
    parts: tuple[Part, ...]
    layout: Layout
    learn: Learn
    weight: float
    skipped: tuple[str, ...] = ()  # files of a folder that are no data
    streaming: bool = False

    def __len__(self) -> int:
        return self._starts[-1]

    @cached_property
    def digest(self) -> str:
        """Equal digests, equal rows; of a stream, which is not read before, by name, size and date of its files."""
        parts = [_stamp(part) if self.streaming else part.digest for part in self.parts]
        layout = (self.layout.format, self.layout.columns, sorted(self.layout.ignore))
        return hashlib.blake2b(repr((parts, layout)).encode(), digest_size=16).hexdigest()

    @property
    def use(self) -> str:
        """Equal for equal rows that are learned alike and come as often."""
        return f"{self.digest} {self.learn} {self.weight:g}"

    def chunks(self) -> Iterator[Chunk]:
        """All rows, as pieces of work for other processes."""
        for start, part in zip(self._starts, self.parts, strict=False):
            yield from part.chunks(start)

    def stream(self, start_row: int = 0) -> NumberedRows:
        """All rows from `start_row` on, one after another. What lies before is skipped, cheaply where that can be."""
        first = 0
        for part in self.parts:
            skipped = max(start_row - first, 0)
            if skipped and part is not self.parts[-1] and skipped >= part.count():
                first += part.count()
                continue
            row = skipped - 1
            for row, record in part.stream(skipped):
                yield first + row, record
            first += row + 1

    def row(self, row: int) -> dict[str, Any] | BadRow:
        """Read one row again."""
        part, own = self._place(row)
        return part.row(own)

    def where(self, row: int) -> str:
        """Say where a row is, for a message to the user."""
        part, own = self._place(row)
        return part.where(own)

    def folder(self, row: int) -> Path:
        """Where the paths in a row begin: beside its file; of a hub dataset, where the run was started."""
        return _folder(self._place(row)[0])

    @property
    def folders(self) -> str:
        """Those of all files."""
        return "\n".join(str(_folder(part)) for part in self.parts)

    @cached_property
    def _starts(self) -> list[int]:
        return list(accumulate((part.count() if self.streaming else len(part) for part in self.parts), initial=0))

    def _place(self, row: int) -> tuple[Part, int]:
        if len(self.parts) == 1:
            return self.parts[0], row  # a stream's length is not asked for
        place = bisect_right(self._starts, row) - 1
        return self.parts[place], row - self._starts[place]


def _folder(part: Part) -> Path:
    return Path.cwd() if part.path is None else part.path.resolve().parent


def open_sources(data: DataSection, split: Split) -> list[Source]:
    """Open every entry of `data.train` or `data.validation`.

    Raises:
        UserError: a file is missing, cannot be read, or holds no row.
    """
    entries = getattr(data, split)
    if entries is None:
        raise UserError(f"data.{split} is not set: give a file, a folder, a glob or a hub dataset id.")
    return [_open(entry, data, split) for entry in entries]


def read_rows(chunk: Chunk, source: Source, reading: Reading) -> Iterator[tuple[int, Conversation | Text]]:
    """Yield a chunk's good rows; note in `reading` the bad ones, and the keys that are not read."""
    layout, named = source.layout, source.layout.named
    for row, record in chunk.rows(reading):
        if isinstance(record, BadRow):
            continue  # noted already
        if len(reading.named) < len(named):
            reading.named |= names_within(record, named)
        try:
            read, unread = read_row(record, layout)
            if isinstance(read, Conversation) and read.has_images:
                read = read._replace(messages=placed_in(read.messages, source.folder(row)))
        except BadRow as problem:
            reading.bad(row, problem)
            continue
        if unread:
            reading.unread.update(unread)
        if isinstance(read, Conversation) and may_have_marks(read.messages):
            reading.foreign.update(foreign_marks(read.messages))
            reading.places += image_marks(read.messages)
        yield row, read


def _open(own: SourceSection, data: DataSection, split: Split) -> Source:
    layout = _layout(own, data, split)
    parts, skipped = _parts(own, layout.ignore, data, split)
    source = Source(own.path, tuple(parts), layout, own.learn or data.learn, own.weight, tuple(skipped), data.streaming)
    if not data.streaming and not len(source):
        raise UserError(f"data.{split}: {own.path} is empty: no line holds a conversation.")
    return source


def _layout(own: SourceSection, data: DataSection, split: Split) -> Layout:
    """What an entry says of its rows itself, else what `data` says."""
    says_itself = own.format is not None or own.columns is not None
    name, columns = (own.format or "auto", own.columns) if says_itself else (data.format, data.columns)
    if columns is not None and name != "auto":
        raise UserError(f"data.{split}: {own.path} has columns and format {name}. Leave one of them out.")
    return Layout(name, columns, frozenset(data.ignore if own.ignore is None else own.ignore))


def _parts(own: SourceSection, ignore: frozenset[str], data: DataSection, split: Split) -> tuple[list[Part], list[str]]:
    """The files of an entry, or its hub dataset; and the files that are no data."""
    path = Path(own.path).expanduser()
    local = path.exists() or own.path.startswith(("/", "./", "../", "~")) or own.path.endswith(SUFFIXES)
    pattern = not path.exists() and glob.has_magic(own.path)
    if not (local or pattern):
        hub_split = own.split or (data.train_split if split == "train" else data.validation_split)
        return [hub_dataset(own.path, own.config or data.hub_config, own.revision, hub_split, split, ignore)], []
    for key in ("config", "revision", "split"):
        if value := getattr(own, key):
            raise UserError(f"data.{split}: {own.path} has {key} {value}, which only a hub dataset has. Leave it out.")
    if path.is_dir() and (all((path / name).exists() for name in SAVED) or (path / SEVERAL_SAVED).exists()):
        return [saved_dataset(path, own.path, ignore)], []
    if path.is_dir() or pattern:
        return _many(own.path, path, pattern, ignore, split)
    if not path.exists():
        near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        guess = did_you_mean(path.name, near)
        raise UserError(f"data.{split}: no file {own.path} (looked in {path.parent.resolve()}).{guess}")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"data.{split}: {own.path} ends in none of {', '.join(KINDS)} (also with .gz): rename it.")
    return [_file(path, own.path, ignore)], []


def _many(
    spelled: str, path: Path, pattern: bool, ignore: frozenset[str], split: Split
) -> tuple[list[Part], list[str]]:
    """The data files of a folder or a glob, sorted by name."""
    names = glob.glob(str(path), recursive=True) if pattern else [str(name) for name in _seen_below(path)]
    found = sorted(name for name in names if Path(name).is_file() and not Path(name).name.startswith("."))
    files = [name for name in found if name.endswith(SUFFIXES) and Path(name).name not in NO_DATA]
    if not files:
        kinds = f"{', '.join(KINDS)} (also with .gz)"
        raise UserError(f"data.{split}: {spelled} {'matches' if pattern else 'holds'} no file that ends in {kinds}.")
    splits = {} if pattern else {match[1]: name for name in files if (match := SPLIT.search(Path(name).name.lower()))}
    if len(splits) > 1:
        some = ", ".join(splits.values())
        way = f"Say which with a glob: {spelled}/**/NAME*."
        raise UserError(f"data.{split}: {spelled} holds files of several splits ({some}). {way}")
    parts: list[Part] = [_file(Path(name), _spelled(name, spelled), ignore) for name in files]
    return parts, [_spelled(name, spelled) for name in found if name not in files]


def _seen_below(folder: Path) -> Iterator[Path]:
    """What lies below a folder, hidden folders left out."""
    for path in folder.rglob("*"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _spelled(name: str, spelled: str) -> str:
    """A found file, with the `~` that the config has."""
    return f"~{name[len(str(Path.home())) :]}" if spelled.startswith("~/") else name


def _file(path: Path, name: str, ignore: frozenset[str]) -> Part:
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind == ".parquet":
        return parquet_file(path, name, ignore)
    if kind in (".csv", ".tsv"):
        return csv_file(path, name, ignore)
    if kind == ".json" and opens_an_array(path, name):
        return JsonArray(path, name)
    return JsonLines(path, name)


def _stamp(part: Part) -> str:
    if part.path is None:
        return part.name
    try:
        status = part.path.stat()
    except OSError as error:
        raise UserError(f"cannot read {part.name}: {told(error)}.") from error
    return f"{part.name}:{status.st_size}:{status.st_mtime_ns}"
