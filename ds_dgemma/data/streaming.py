"""Examples of sources that are read while training: what does not fit a disk, or should not be read before.

Rows are taken in the order of their sources, `data.shuffle_buffer` at once: a block. Its rows are tokenized, its
examples put in an order keyed by the seed and the block, and packed or grouped like those of a source that was read
before (`order.py`); where one block holds all of a source, the order is the same. Of several sources a block holds
shares by weight, and each begins again when it is through.

Every rank reads all rows and makes the examples of its share: a batch is the same on any topology. A `Cursor` says
where a step ends, so a resumed run reads on from there.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import count, islice
from typing import Any, NamedTuple

from ds_dgemma.data.batch import Batch, Example
from ds_dgemma.data.canvas import Cut
from ds_dgemma.data.examples import SourceExamples, examples_of
from ds_dgemma.data.findings import first_seen, settle
from ds_dgemma.data.formats import BadRow
from ds_dgemma.data.order import Arrangement, permutation
from ds_dgemma.data.reading import Reading
from ds_dgemma.data.rows import RowReader
from ds_dgemma.data.stream import Collate, Share
from ds_dgemma.data.token_cache import held_rows
from ds_dgemma.data.workers import map_in_order, start_server
from ds_dgemma.errors import UserError, counted

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where a source stands: how often it has been through, and its next row."""

    epoch: int = 0
    row: int = 0


@dataclass(frozen=True)
class Cursor:
    """Where a stream stands, as a checkpoint keeps it."""

    sources: tuple[Place, ...]  # when the block began
    block: int = 0
    used: int = 0  # rows of a batch, of the block

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> "Cursor":
        """From a checkpoint's facts."""
        return cls(tuple(Place(*place) for place in facts["sources"]), facts["block"], facts["used"])

    def facts(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)


@dataclass(frozen=True)
class _Rows:
    """Rows that were read, as a piece of work."""

    read: list[tuple[int, dict[str, Any] | BadRow]]

    def rows(self, reading: Reading | None = None) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        for row, record in self.read:
            if reading is not None:
                reading.saw(row, record)
            yield row, record


class _Drawn(NamedTuple):
    """An example of a block."""

    examples: SourceExamples
    place: int
    epoch: int

    def make(self) -> tuple[Example, int]:
        return self.examples[self.place], self.epoch


@dataclass
class StreamedExamples:
    """The endless order of examples of streamed sources."""

    readers: tuple[RowReader, ...]
    cut: Cut
    arrangement: Arrangement
    seed: int
    block: int  # rows
    tells: bool  # of rows that are dropped, and what is not read
    _open: dict[int, tuple[Place, Iterator]] = field(default_factory=dict)
    _seen: dict[int, Reading] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Of the sources, as far as it is known without reading them."""
        return " ".join(reader.source.use for reader in self.readers)

    def report(self, split: str) -> list[str]:
        """What a user should know before anything is read."""
        return [f"{split}: {len(self.readers)} sources are read while training"]

    @property
    def begin(self) -> Cursor:
        """Before the first row."""
        return Cursor(tuple(Place() for _ in self.readers))

    def rows(self, cursor: Cursor) -> Iterator[tuple[list[_Drawn], Cursor]]:
        """The rows of batches from `cursor` on, each with the cursor behind it."""
        fruitless = 0
        while True:
            drawn, following = self._block(cursor)
            fruitless = 0 if drawn else fruitless + 1
            if fruitless and all(place.epoch > 1 for place in following.sources):
                raise UserError(f"no example of {self.readers[0].source.name} can be trained on: see data.max_length.")
            first = cursor.sources[0]
            alone = len(self.readers) == 1
            key = (first.epoch, *([first.row] if first.row else [])) if alone else ("block", cursor.block)
            shuffled = [drawn[i] for i in permutation(len(drawn), "order", self.seed, *key)]
            lengths = [int(one.examples.length_N[one.place]) for one in shuffled]
            epoch, number = (first.epoch, first.row // self.block) if alone else (0, cursor.block)
            rows = self.arrangement.rows(lengths, epoch, number)
            for used in range(cursor.used, len(rows)):
                yield [shuffled[place] for place in rows[used]], replace(cursor, used=used + 1)
            cursor = following

    def _block(self, cursor: Cursor) -> tuple[list[_Drawn], Cursor]:
        """The examples of the block that begins at `cursor`, and the cursor of the next block."""
        total, block = sum(reader.source.weight for reader in self.readers), cursor.block
        drawn, places = [], []
        for number, (reader, place) in enumerate(zip(self.readers, cursor.sources, strict=True)):
            share = self.block * reader.source.weight / total
            wanted = int(round((block + 1) * share, 6)) - int(round(block * share, 6))
            while wanted:
                rows, place, epoch = self._take(number, place, wanted)
                drawn += self._examples(number, rows, epoch)
                wanted = 0 if len(self.readers) == 1 else wanted - len(rows)
            places.append(place)
        return drawn, Cursor(tuple(places), block + 1)

    def _take(self, number: int, place: Place, wanted: int) -> tuple[list, Place, int]:
        """Up to so many rows of a source, the place behind them, and the epoch that they are of; an epoch ends them."""
        opened, rows = self._open.get(number, (None, iter(())))
        if opened != place:
            rows = self.readers[number].source.stream(place.row)
        taken = list(islice(rows, wanted))
        behind = Place(place.epoch, place.row + len(taken))
        if len(taken) < wanted:
            if not behind.row:
                raise UserError(f"{self.readers[number].source.name} is empty: no row holds a conversation.")
            following = Place(place.epoch + 1)
            return (taken, following, place.epoch) if taken else self._take(number, following, wanted)
        self._open[number] = behind, rows
        return taken, behind, place.epoch

    def _examples(self, number: int, rows: list, epoch: int) -> list[_Drawn]:
        reader = self.readers[number]
        held, reading = held_rows(reader, _Rows(rows))
        if reading.bad_rows and reader.data.invalid == "error":
            settle([(reader.source, reading)], "train")
        if self.tells and epoch == 0:
            self._tell(number, reading)
        examples = examples_of(reader.source, number, held, self.cut)
        return [_Drawn(examples, place, epoch) for place in range(len(examples))]

    def _tell(self, number: int, reading: Reading) -> None:
        """What a user should know of rows that are read for the first time."""
        source, seen = self.readers[number].source, self._seen.setdefault(number, Reading())
        new, bad_rows = reading.unread.keys() - seen.unread.keys(), seen.bad_rows
        for line in first_seen(source, reading, seen):
            log.warning("%s", line)
        seen.add(reading)
        if new:
            log.warning("%s: not read: %s", source.name, ", ".join(sorted(new)))
        if reading.bad_rows:
            row, problem = reading.problems[0]
            counts = f"{counted(seen.bad_rows - bad_rows, 'row')} dropped ({seen.bad_rows:,} of {seen.rows:,} so far)"
            log.warning("%s: %s, the first %s: %s", source.name, counts, source.where(row), problem)


class _Maker:
    """Makes a rank's micro-batches one after another, so one process makes them all."""

    def __init__(self, examples: StreamedExamples, collate: Collate, share: Share, cursor: Cursor) -> None:
        self._examples, self._collate, self._share, self._cursor = examples, collate, share, cursor
        self._rows: Iterator[tuple[list[_Drawn], Cursor]] | None = None
        self._step: list[list[_Drawn]] = []

    def __call__(self, number: int) -> tuple[Batch, Cursor]:
        if self._rows is None:  # in the process that makes them
            self._rows = self._examples.rows(self._cursor)
        micro_batch = number % self._share.accumulation
        if micro_batch == 0:
            taken = list(islice(self._rows, self._share.global_batch_size))
            self._step, self._cursor = [row for row, _ in taken], taken[-1][1]
        drawn = [one for row in self._share.rows(micro_batch) for one in self._step[row]]
        return self._collate([one.make() for one in drawn]), self._cursor


@dataclass(kw_only=True)
class StreamedBatches:
    """An endless iterator of steps, as `stream.Stream`."""

    examples: StreamedExamples
    collate: Collate
    share: Share
    cursor: Cursor  # behind the last step
    workers: int = 0

    def __post_init__(self) -> None:
        if self.workers:
            start_server()

    def __iter__(self) -> Iterator[list[Batch]]:
        make = _Maker(self.examples, self.collate, self.share, self.cursor)
        made = map_in_order(make, count(), min(self.workers, 1))
        while True:
            step = [next(made) for _ in range(self.share.accumulation)]
            self.cursor = step[-1][1]
            yield [batch for batch, _ in step]
