"""Examples in training order, shared out: this rank's micro-batches of every step.

Row p = step * global_batch_size + i of the endless order (`order.py`) is the i-th of a step. Micro-batch a of rank r
holds rows i = (a * world + r) * micro .. + micro, so ranks, micro-batch size and accumulation share out one and the
same global batch, and any step can be made without those before it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice

from ds_dgemma.data.batch import Batch, Example
from ds_dgemma.data.examples import ExampleSet
from ds_dgemma.data.order import Item, Order
from ds_dgemma.data.workers import map_in_order, start_server

Collate = Callable[[list[tuple[Example, int]]], Batch]  # examples, each with its epoch


@dataclass(frozen=True)
class Share:
    """Which rows of a global batch are a rank's; `config/division.py` has checked that it divides."""

    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1

    @property
    def accumulation(self) -> int:
        """Micro-batches per step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def rows(self, micro_batch: int) -> range:
        """The rows of one of this rank's micro-batches."""
        first = (micro_batch * self.world_size + self.rank) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)

    def items(self, order: Order, step: int, micro_batch: int) -> list[Item]:
        """The examples of one of this rank's micro-batches of a step."""
        start = step * self.global_batch_size
        return [item for row in self.rows(micro_batch) for item in order.row(start + row)]


@dataclass(frozen=True, kw_only=True)
class Stream:
    """An endless iterator of steps, each a list of micro-batches: this rank's share of the global batch.

    `collate` runs in the workers, so it must be a function that can be pickled (a `functools.partial` can).
    """

    examples: ExampleSet
    order: Order
    collate: Collate
    share: Share
    workers: int = 0
    start_step: int = 0

    def __post_init__(self) -> None:
        if self.workers:
            start_server()

    def __iter__(self) -> Iterator[list[Batch]]:
        shares = (share for step in count(self.start_step) for share in self.shares(step))
        make = partial(make_batch, examples=self.examples, collate=self.collate)
        batches = map_in_order(make, shares, self.workers)
        while True:
            yield list(islice(batches, self.share.accumulation))

    def shares(self, step: int) -> list[list[Item]]:
        """Return the examples of each of this rank's micro-batches of a step."""
        return [self.share.items(self.order, step, number) for number in range(self.share.accumulation)]


def make_batch(share: list[Item], examples: ExampleSet, collate: Collate) -> Batch:
    """The micro-batch of some examples."""
    return collate([(examples[index], epoch) for index, epoch in share])
