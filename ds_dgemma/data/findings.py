"""What a person is told of rows that were read: bad ones, keys that stand twice or that no one reads, equal ids."""

from collections import Counter
from collections.abc import Iterable
from typing import Literal

from ds_dgemma.data.reading import SHOWN, Reading, printable
from ds_dgemma.data.sources import Source
from ds_dgemma.errors import UserError, counted, did_you_mean


def settle(
    readings: Iterable[tuple[Source, Reading]], split: str, invalid: Literal["error", "drop"] = "error"
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


def not_read(source: Source, reading: Reading) -> str | None:
    """Name the keys, and the files of a folder, that were not read."""
    keys = [f"{printable(key)} ({counted(count, 'row')})" for key, count in reading.unread.most_common()]
    left = [*keys, *source.skipped]
    return f"{source.name}: not read: {', '.join(left)}" if left else None


def first_seen(source: Source, reading: Reading, before: Reading) -> list[str]:
    """What is told of rows while a stream is read: each kind of thing once."""
    lines = []
    if reading.doubled and not before.doubled:
        lines += _doubled_keys(source, reading)[:1]
    new = Reading(foreign=reading.foreign - Counter(dict.fromkeys(before.foreign, reading.rows)))
    new.places = 0 if before.places else reading.places
    return [*lines, *(f"{source.name}: {line}" for line in _foreign(new))]


def _never_seen(source: Source, reading: Reading) -> list[str]:
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


def _bad_rows(source: Source, reading: Reading, split: str) -> str:
    count = f"{counted(reading.bad_rows, 'bad row')} of {reading.rows:,}"
    shown = f" (the first {SHOWN})" if reading.bad_rows > SHOWN else ""
    problems = [f"  {source.where(row)}: {problem}" for row, problem in sorted(reading.problems)]
    return "\n".join([f"{count} in data.{split} = {source.name}{shown}", *problems])


def _doubled_keys(source: Source, reading: Reading) -> list[str]:
    lines = [
        f"{source.where(row)}: key {key!r} stands twice in an object; the last counts" for row, key in reading.doubled
    ]
    return [*lines, *_more(source, reading.doubled_rows, "with a key that stands twice")]


def _same_ids(source: Source, reading: Reading) -> list[str]:
    pairs = reading.same_ids()
    lines = [f"{source.where(row)}: its id is that of {source.where(first)} too" for row, first in pairs[:SHOWN]]
    return [*lines, *_more(source, len(pairs), "with the id of another")]


def _more(source: Source, count: int, what: str) -> list[str]:
    return [f"{source.name}: {counted(count - SHOWN, 'row')} more {what}"] if count > SHOWN else []
