"""In which order examples come: a batch is a pure function of (seed, step), on any topology.

The endless order is made of epochs, an epoch of blocks, a block of *rows*: the examples that stand together in one row
of a batch, one unless they are packed. Nothing is dropped at a border: batches run over it.

- An epoch is a permutation of all examples, keyed by (seed, epoch); of a source with weight w it has w times as many,
  in that source's own endless order: with 2 every example comes twice, with 0.5 in every second epoch.
- A block is `data.shuffle_buffer` examples of it. Within a block examples are packed, or grouped by length.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate
from typing import NamedTuple

import numpy as np


class Item(NamedTuple):
    """An example of an endless order."""

    place: int  # among all examples
    epoch: int  # how often its source has been through


Rows = list[list[int]]  # rows of places in a block


@lru_cache(maxsize=4)
def permutation(size: int, *key: str | int) -> np.ndarray:
    """Return a permutation that depends on nothing but its arguments.

    It sorts Philox's raw bits rather than calling `Generator.permutation`, whose result may change between
    versions of numpy (NEP 19): a resumed run keeps its order after an upgrade.
    """
    digest = blake2b(" ".join(map(str, key)).encode(), digest_size=16).digest()
    return np.argsort(np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(size), kind="stable")


def best_fit(lengths: Sequence[int], room: int) -> Rows:
    """Pack examples into rows of `room` tokens: the longest first, each into the fullest row that has room for it."""
    rows: Rows = []
    left: list[tuple[int, int]] = []  # room that is left, row; sorted
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        fit = bisect_left(left, (lengths[place], -1))
        space, row = left.pop(fit) if fit < len(left) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(place)
        insort(left, (space - lengths[place], row))
    return rows


@dataclass(frozen=True)
class Arrangement:
    """How the examples of a block are put into rows."""

    seed: int
    packs_to: int | None = None  # tokens of a row; None: an example is a row
    group: int = 0  # rows of like length that stand together; 0: as they come

    @property
    def keeps_order(self) -> bool:
        """Whether every example is a row of its own, as it comes."""
        return self.packs_to is None and not self.group

    def rows(self, lengths: Sequence[int], epoch: int, block: int) -> Rows:
        """The rows of a block whose examples have `lengths`, in order."""
        if self.packs_to is not None:
            return self._shuffled(best_fit(lengths, self.packs_to), "packs", epoch, block)
        alone = [[place] for place in range(len(lengths))]
        if not self.group:
            return alone
        alone.sort(key=lambda row: lengths[row[0]])
        groups = [alone[start : start + self.group] for start in range(0, len(alone), self.group)]
        return [row for group in self._shuffled(groups, "groups", epoch, block) for row in group]

    def _shuffled(self, things: list, *key: str | int) -> list:
        purpose, *where = key
        return [things[i] for i in permutation(len(things), purpose, self.seed, *where)]


class Epoch(NamedTuple):
    """The examples of an epoch in order, and where its rows end."""

    index_n: np.ndarray  # int64
    own_n: np.ndarray  # int64, how often its source has been through
    end_R: np.ndarray  # int64

    def row(self, place: int) -> list[Item]:
        """The examples of a row."""
        part = slice(int(self.end_R[place - 1]) if place else 0, int(self.end_R[place]))
        return [Item(*item) for item in zip(self.index_n[part].tolist(), self.own_n[part].tolist(), strict=True)]


@dataclass(frozen=True)
class Order:
    """The endless order of examples whose number and lengths are known."""

    seed: int
    lengths_N: np.ndarray  # tokens of all examples, source after source
    sizes: tuple[int, ...]  # examples of each source
    weights: tuple[float, ...]  # of each source
    arrangement: Arrangement
    block: int  # examples
    _ends: list[int] = field(default_factory=list)  # rows until the end of each epoch that was asked for
    _made: dict[int, Epoch] = field(default_factory=dict)  # the latest

    def row(self, position: int) -> list[Item]:
        """The examples of a row of the endless order."""
        while not self._ends or position >= self._ends[-1]:
            self._ends.append((self._ends[-1] if self._ends else 0) + self._size(len(self._ends)))
        epoch = bisect_right(self._ends, position)
        return self._epoch(epoch).row(position - (self._ends[epoch - 1] if epoch else 0))

    def _size(self, epoch: int) -> int:
        """Rows of an epoch."""
        if self.arrangement.packs_to is not None:
            return len(self._epoch(epoch).end_R)
        return sum(end - begin for begin, end in self._drawn(epoch))

    def _drawn(self, epoch: int) -> list[tuple[int, int]]:
        """Of each source, the places of its own endless order that an epoch has."""
        shares = [size * weight for size, weight in zip(self.sizes, self.weights, strict=True)]
        return [(int(round(epoch * share, 6)), int(round((epoch + 1) * share, 6))) for share in shares]

    def _epoch(self, epoch: int) -> Epoch:
        if epoch not in self._made:
            while len(self._made) > 1:
                self._made.pop(next(iter(self._made)))
            self._made[epoch] = self._make(epoch)
        return self._made[epoch]

    def _make(self, epoch: int) -> Epoch:
        index_n, own_n = self._items(epoch)
        if self.arrangement.keeps_order:
            return Epoch(index_n, own_n, np.arange(1, len(index_n) + 1))
        order, sizes = [], []
        for number, begin in enumerate(range(0, len(index_n), self.block)):
            lengths = self.lengths_N[index_n[begin : begin + self.block]].tolist()
            for row in self.arrangement.rows(lengths, epoch, number):
                order += [begin + place for place in row]
                sizes.append(len(row))
        return Epoch(index_n[order], own_n[order], np.cumsum(sizes))

    def _items(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        index, owns = [], []
        firsts = accumulate(self.sizes, initial=0)
        for source, ((begin, end), size, first) in enumerate(zip(self._drawn(epoch), self.sizes, firsts, strict=False)):
            for own in range(begin // size, -(-end // size)):
                key = ("order", self.seed, own) if len(self.sizes) == 1 else ("order", self.seed, own, source)
                places = permutation(size, *key)[max(begin - own * size, 0) : end - own * size]
                index.append(first + places)
                owns.append(np.full(len(places), own))
        index_n, own_n = np.concatenate(index), np.concatenate(owns)
        if len(self.sizes) == 1:
            return index_n, own_n
        mixed = permutation(len(index_n), "mixture", self.seed, epoch)
        return index_n[mixed], own_n[mixed]
