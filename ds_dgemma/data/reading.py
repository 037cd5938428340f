"""What was seen while a source's rows were read: how many, which are bad, which keys no one reads, what stands twice.

Workers keep a `Reading` for each piece of work; they are added up in the order of rows. Ids are held as 8-byte hashes,
so a million rows cost 16 MB.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash

from ds_dgemma.data.messages import BadRow
from ds_dgemma.errors import UserError, counted, did_you_mean

if TYPE_CHECKING:
    from ds_dgemma.data.sources import Source

SHOWN = 10


@dataclass
class Reading:
    """A summary of rows that were read; the first of each kind of problem by row number."""

    rows: int = 0
    bad_rows: int = 0
    problems: list[tuple[int, str]] = field(default_factory=list)  # row, what is wrong
    unread: Counter[str] = field(default_factory=Counter)  # key: rows that have it
    named: set[str] = field(default_factory=set)  # names of the config, `Layout.named`, that a row has
    foreign: Counter[str] = field(default_factory=Counter)  # another model's control text: answers that have it
    places: int = 0  # texts with <image> in them and no image for it
    doubled_rows: int = 0
    doubled: list[tuple[int, str]] = field(default_factory=list)  # row, a key that an object of it has twice
    id_rows: array = field(default_factory=lambda: array("q"))
    id_hashes: array = field(default_factory=lambda: array("Q"))

    def saw(self, row: int, record: dict[str, Any] | BadRow, doubled: Sequence[str] = ()) -> None:
        """Note a row as it stands in its file."""
        self.rows += 1
        if isinstance(record, BadRow):
            self.bad(row, record)
        elif (name := record.get("id")) is not None:
            self.id_rows.append(row)
            self.id_hashes.append(xxhash.xxh3_64_intdigest(str(name).encode("utf-8", "surrogatepass")))
        if doubled:
            self.doubled_rows += 1
            self.doubled = [*self.doubled, (row, doubled[0])][:SHOWN]

    def bad(self, row: int, problem: BadRow | str) -> None:
        """Note a row that cannot be trained on."""
        self.bad_rows += 1
        self.problems = [*self.problems, (row, printable(str(problem)))][:SHOWN]

    def add(self, other: "Reading") -> None:
        """Add what was seen of the rows behind."""
        self.rows += other.rows
        self.bad_rows += other.bad_rows
        self.problems = [*self.problems, *other.problems][:SHOWN]
        self.unread += other.unread
        self.named |= other.named
        self.foreign += other.foreign
        self.places += other.places
        self.doubled_rows += other.doubled_rows
        self.doubled = [*self.doubled, *other.doubled][:SHOWN]
        self.id_rows += other.id_rows
        self.id_hashes += other.id_hashes

    def same_ids(self) -> list[tuple[int, int]]:
        """Pairs of a row and the first row with its id, in the order of rows."""
        hashes, rows = np.frombuffer(self.id_hashes, np.uint64), np.frombuffer(self.id_rows, np.int64)
        if not len(hashes):
            return []
        _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        later = np.flatnonzero(first[inverse] != np.arange(len(hashes)))
        return [(int(rows[place]), int(rows[first[inverse[place]]])) for place in later]


def settle(
    readings: Iterable[tuple["Source", Reading]], split: str, invalid: Literal["error", "drop"] = "error"
) -> list[str]:
    """Return what is to be told of sources that were read whole: bad rows that are dropped, warnings, unread keys.

    Raises:
        UserError: bad rows with `invalid` error, each named; or no row is left.
    """
    readings = list(readings)
    bad = [_bad_rows(source, reading, split) for source, reading in readings if reading.bad_rows]
    if bad and (invalid == "error" or all(reading.bad_rows == reading.rows for _, reading in readings)):
        raise UserError("\n".join(bad))
    told = [f"dropped: {lines}" for lines in bad]
    for source, reading in readings:
        told += [*_doubled_keys(source, reading), *_same_ids(source, reading)]
        told += [line] if (line := not_read(source, reading)) else []
        told += [f"{source.name}: {line}" for line in [*_never_seen(source, reading), *_foreign(reading)]]
    return told


def not_read(source: "Source", reading: Reading) -> str | None:
    """Name the keys, and the files of a folder, that were not read."""
    keys = [f"{printable(key)} ({counted(count, 'row')})" for key, count in reading.unread.most_common()]
    left = [*keys, *source.skipped]
    return f"{source.name}: not read: {', '.join(left)}" if left else None


def first_seen(source: "Source", reading: Reading, before: Reading) -> list[str]:
    """What is told of rows while a stream is read: each kind of thing once."""
    lines = []
    if reading.doubled and not before.doubled:
        lines += _doubled_keys(source, reading)[:1]
    new = Reading(foreign=reading.foreign - Counter(dict.fromkeys(before.foreign, reading.rows)))
    new.places = 0 if before.places else reading.places
    return [*lines, *(f"{source.name}: {line}" for line in _foreign(new))]


def _never_seen(source: "Source", reading: Reading) -> list[str]:
    return [
        f"no row has {name}, which {'data.ignore' if name in source.layout.ignore else 'data.columns.images'} names."
        f"{did_you_mean(name, reading.unread)}"
        for name in sorted(source.layout.named - reading.named)
    ]


def _foreign(reading: Reading) -> list[str]:
    places = [
        f"<image> stands in {counted(reading.places, 'text')} and is learned as plain text: the images of a row are in "
        "its column image or images, or in parts of its messages"
    ]
    return places[: reading.places] + [
        f"{mark} stands in {counted(count, 'answer')} and is learned as plain text: thoughts go into "
        "reasoning_content, calls into tool_calls"
        for mark, count in reading.foreign.items()
    ]


def printable(text: str, but: str = "") -> str:
    """A row's own words may hold what no line takes: breaks, commands to a terminal, halves of surrogate pairs; `but`:
    what of these may stand.
    """
    return "".join(letter if letter.isprintable() or letter in but else repr(letter)[1:-1] for letter in text)


def _bad_rows(source: "Source", reading: Reading, split: str) -> str:
    count = f"{counted(reading.bad_rows, 'bad row')} of {reading.rows:,}"
    shown = f" (the first {SHOWN})" if reading.bad_rows > SHOWN else ""
    problems = [f"  {source.where(row)}: {problem}" for row, problem in sorted(reading.problems)]
    return "\n".join([f"{count} in data.{split} = {source.name}{shown}", *problems])


def _doubled_keys(source: "Source", reading: Reading) -> list[str]:
    lines = [
        f"{source.where(row)}: key {key!r} stands twice in an object; the last counts" for row, key in reading.doubled
    ]
    return [*lines, *_more(source, reading.doubled_rows, "with a key that stands twice")]


def _same_ids(source: "Source", reading: Reading) -> list[str]:
    pairs = reading.same_ids()
    lines = [f"{source.where(row)}: its id is that of {source.where(first)} too" for row, first in pairs[:SHOWN]]
    return [*lines, *_more(source, len(pairs), "with the id of another")]


def _more(source: "Source", count: int, what: str) -> list[str]:
    return [f"{source.name}: {counted(count - SHOWN, 'row')} more {what}"] if count > SHOWN else []
