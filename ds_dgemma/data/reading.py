"""What was seen while a source's rows were read: how many, which are bad, which keys no one reads, what stands twice.

Workers keep a `Reading` for each piece of work; they are added up in the order of rows. Ids are held as 8-byte hashes,
so a million rows cost 16 MB.
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from ds_dgemma.data.messages import BadRow

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


def printable(text: str, but: str = "") -> str:
    """A row's own words may hold what no line takes: breaks, commands to a terminal, halves of surrogate pairs; `but`:
    what of these may stand.
    """
    return "".join(letter if letter.isprintable() or letter in but else repr(letter)[1:-1] for letter in text)
