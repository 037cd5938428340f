"""Examples in training order: a batch is a pure function of (seed, step).

Global position p = step * global_batch_size + i lies in epoch p // N, at place p % N of that epoch's
permutation, which is keyed by (seed, epoch); batches run over the border of an epoch, nothing is dropped.
Micro-batch a of rank r holds positions i = (a * world + r) * micro .. + micro of a step, so ranks,
micro-batch size and accumulation share out one and the same global batch, and any step can be made without
those before it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import blake2b
from itertools import count, islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from ds_dgemma.config import DataSection
from ds_dgemma.data.batch import Batch, Example
from ds_dgemma.data.canvas import LengthReport, canvases_kept, canvases_needed, make_example, too_long
from ds_dgemma.data.chat import row_of
from ds_dgemma.data.sources import SHOWN_PROBLEMS, Conversations
from ds_dgemma.data.token_cache import DEFAULT_FOLDER, TokenizedTurns, tokenized_turns
from ds_dgemma.data.workers import map_in_order, start_server
from ds_dgemma.errors import UserError

Collate = Callable[[list[tuple[Example, int]]], Batch]  # examples, each with its epoch


@dataclass(frozen=True)
class ExampleSet:
    """The examples that the length policy kept, cut into canvases when asked for."""

    turns: TokenizedTurns
    digest: str  # of the conversations' content
    kept: np.ndarray  # indices into turns
    data: DataSection
    canvas_length: int
    eos_id: int
    report: LengthReport

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Example:
        turn = self.kept[index]
        prompt, response = self.turns.read(turn)
        example = make_example(
            prompt.tolist(),
            response.tolist(),
            self.canvas_length,
            self.eos_id,
            int(self.turns.sample_ids_N[turn]),
            self.data.max_length,
            self.data.over_length,
        )
        assert example is not None  # only kept ones are listed
        return example


def prepare_examples(
    conversations: Conversations,
    tokenizer: PreTrainedTokenizerFast,
    data: DataSection,
    canvas_length: int,
    eos_id: int,
    cache: Path = DEFAULT_FOLDER,
) -> ExampleSet:
    """Tokenize all conversations (once: see token_cache) and apply the length policy; every rank calls it."""
    turns = tokenized_turns(conversations, tokenizer, data.assistant_turns, eos_id, cache)
    prompts, responses = turns.prompt_lengths_N, turns.response_lengths_N
    needed = canvases_needed(responses, canvas_length)
    kept = canvases_kept(prompts, responses, canvas_length, data.max_length, data.over_length)
    report = LengthReport(
        kept=int((kept > 0).sum()),
        dropped=int((kept == 0).sum()),
        truncated=int(((kept > 0) & (kept < needed)).sum()),
        max_length=data.max_length,
    )
    if data.over_length == "error" and report.dropped:
        raise _over_length_error(conversations, turns, np.flatnonzero(kept == 0), data, canvas_length)
    if not report.kept:
        one_canvas = np.where(data.over_length == "truncate", 1, needed)
        shortest = int((prompts + one_canvas * canvas_length).min())
        raise UserError(
            f"{conversations.name}: no example fits data.max_length {data.max_length}; the shortest takes "
            f"{shortest} tokens with canvases of {canvas_length}. Raise data.max_length."
        )
    return ExampleSet(turns, conversations.digest, np.flatnonzero(kept), data, canvas_length, eos_id, report)


def _over_length_error(
    conversations: Conversations,
    turns: TokenizedTurns,
    over: np.ndarray,
    data: DataSection,
    canvas_length: int,
) -> UserError:
    count = "1 example is" if len(over) == 1 else f"{len(over)} examples are"
    lines = [f"{conversations.name}: {count} too long, and data.over_length is error"]
    for turn in over[:SHOWN_PROBLEMS]:
        where = conversations.where(row_of(int(turns.sample_ids_N[turn]), data.assistant_turns))
        lengths = int(turns.prompt_lengths_N[turn]), int(turns.response_lengths_N[turn])
        lines.append(f"  {where}: {too_long(*lengths, canvas_length, data.max_length)}")
    return UserError("\n".join([*lines, "  Raise data.max_length, or set data.over_length to drop or truncate."]))


@dataclass(frozen=True, kw_only=True)
class Stream:
    """An endless iterator of steps, each a list of micro-batches: this rank's share of the global batch.

    `collate` runs in the workers, so it must be a function that can be pickled (a `functools.partial` can).
    """

    examples: ExampleSet
    collate: Collate
    seed: int
    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    workers: int = 0
    start_step: int = 0

    def __post_init__(self) -> None:
        unit = self.micro_batch_size * self.world_size
        if self.global_batch_size % unit:
            below = self.global_batch_size // unit * unit
            fitting = " or ".join(str(size) for size in (below, below + unit) if size)
            raise UserError(
                f"train.global_batch_size {self.global_batch_size} is not a multiple of "
                f"train.micro_batch_size x ranks = {self.micro_batch_size} x {self.world_size} = {unit}. "
                f"Use {fitting}."
            )
        if self.workers:
            start_server()

    @property
    def accumulation(self) -> int:
        """Micro-batches per step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[Batch]]:
        shares = (share for step in count(self.start_step) for share in self.shares(step))
        make = partial(_make_batch, examples=self.examples, collate=self.collate)
        batches = map_in_order(make, shares, self.workers)
        while True:
            yield list(islice(batches, self.accumulation))

    def shares(self, step: int) -> list[list[tuple[int, int]]]:
        """Return, for each of this rank's micro-batches of a step, the (index, epoch) of its examples."""
        micro, start = self.micro_batch_size, step * self.global_batch_size
        offsets = [(a * self.world_size + self.rank) * micro for a in range(self.accumulation)]
        return [[locate(self.seed, start + offset + i, len(self.examples)) for i in range(micro)] for offset in offsets]


def locate(seed: int, position: int, size: int) -> tuple[int, int]:
    """Return (index, epoch) of a global position in the endless order of `size` examples."""
    epoch, place = divmod(position, size)
    return int(epoch_order(seed, epoch, size)[place]), epoch


@lru_cache(maxsize=4)  # training and validation, two epochs each
def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Return the permutation of an epoch.

    It sorts Philox's raw bits rather than calling `Generator.permutation`, whose result may change between
    versions of numpy (NEP 19): a resumed run keeps its order after an upgrade.
    """
    key = int.from_bytes(blake2b(f"order {seed} {epoch}".encode(), digest_size=16).digest(), "little")
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")


def _make_batch(share: list[tuple[int, int]], examples: ExampleSet, collate: Collate) -> Batch:
    return collate([(examples[index], epoch) for index, epoch in share])
