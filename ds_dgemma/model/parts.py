"""Which tokens see which, in parts that need no mask.

The tokens of a call are one flat sequence, `[clean tokens of D documents, one behind another | C canvases of L]`:

- clean tokens see clean tokens of their document, causally, on sliding layers the last `window` of them (itself
  included), and what `ImageRule` says of an image's own tokens;
- a canvas sees the clean tokens of its document before its start, on sliding layers the last `window - 1` of those, and
  all of itself. Nothing else reads a canvas, and nothing sees another document.

Each of these sets is cut into *parts*, rectangles and triangles of (queries, keys) that a kernel computes whole or
causally: no mask exists, nothing grows with S * S, and nothing is computed that nobody sees. A sliding layer goes in
blocks of a window, here 4 clean tokens in blocks of window 2 (c: causal part, t: triangle, read backwards), and an
image adds the triangle above its diagonal:

        c . . .
        c c . .
        . t c .
        . . c c

Neighbours that are alike, documents of one length and canvases with as much before them, share a part.

`tests/reference/masks.py` has the same rules as dense masks. Sources: transformers `modeling_diffusion_gemma.py`
(`create_diffusion_decoder_attention_mask`, sliding cache, `create_masks_for_generate`); gemma/diffusion
`hackable_diffusion_adapter/hd/mask_helpers.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, chain, groupby, starmap
from typing import Literal, NamedTuple

from torch import Tensor

# Whom a token of an image sees in it beside the tokens before it.
# generate: all of the image, on every layer, whatever the window: transformers' `generate()`.
# sliding: on sliding layers the tokens behind it: Gemma 4 elsewhere in transformers, Google's code.
ImageRule = Literal["generate", "sliding"]


BLOCKS = 1024  # tokens of neighbouring blocks, so many at most are one part: kernels get copies of its triangles


class Cache(NamedTuple):
    """Where the documents of a call stand in a cache, which has all their keys and values, [room of all, g, d]. The
    call's go behind those that are there, and the call sees both.
    """

    rooms: tuple[int, ...]  # tokens that it has room for, of each
    filled: tuple[int, ...]  # clean tokens before the call's
    is_canvas: bool  # the call's tokens of a document are a canvas, not clean
    padding: tuple[int, ...] = ()  # first tokens of each that nothing sees; on a CPU only
    keys_only: bool = False  # nobody reads what else the layer makes of the tokens


class Image(NamedTuple):
    """The soft tokens of an image: their document, the first of them in it, and the one behind the last."""

    document: int
    begin: int
    end: int


class Canvas(NamedTuple):
    """A canvas's place: its document, and how many clean tokens of that stand before it."""

    document: int
    start: int


@dataclass(frozen=True)
class Tokens:
    """The tokens of one call, all as host integers: no device is asked."""

    documents: tuple[int, ...]  # clean tokens of each
    canvases: tuple[Canvas, ...]
    length: int  # L
    reads_clean: bool = True  # False: canvases only, against keys and values that were kept
    kept_whole: bool = False  # those of all clean tokens were
    cache: Cache | None = None
    images: tuple[Image, ...] = ()  # among the clean tokens of this call
    image_rule: ImageRule = "generate"

    @property
    def clean_total(self) -> int:
        """Clean tokens of this call."""
        return sum(self.documents) if self.reads_clean else 0

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Clean tokens before each document."""
        return tuple(accumulate(self.documents, initial=0))


@dataclass(frozen=True)
class Span:
    """Tokens `begin` to `end` of `rows` neighbours, each `length` tokens long, the first at `offset`."""

    offset: int
    rows: int
    length: int
    begin: int
    end: int

    def of(self, flat_Nhd: Tensor) -> Tensor:
        """A view of them, [rows, h, T, d]."""
        rows = flat_Nhd.narrow(0, self.offset, self.rows * self.length).unflatten(0, (self.rows, self.length))
        return rows[:, self.begin : self.end].transpose(1, 2)


@dataclass(frozen=True)
class Part:
    """Queries and the keys that all of them see, or see causally."""

    queries: Span
    keys: Span | int  # or the number of a kept slice
    of_kept: bool = False  # the span is of what was kept whole, not of this call
    causal: bool = False
    backwards: bool = False  # the last query and key first: causally, that is the triangle above the diagonal
    merges: bool = True  # into what earlier parts gave the same queries


class Run(NamedTuple):
    """Neighbouring canvases, of neighbouring documents of one length, that start alike: one part serves all."""

    first: int  # canvas
    canvases: int
    document: int
    start: int


def visible(start: int, window: int | None) -> tuple[int, int]:
    """The clean tokens that a canvas sees, [begin, end): every token of the canvas the same."""
    return (0 if window is None else max(0, start - window + 1)), start


@lru_cache(maxsize=256)
def runs(documents: tuple[int, ...], canvases: tuple[Canvas, ...]) -> tuple[Run, ...]:
    """Canvases in runs, in order; those that see no clean token are in none."""
    found: list[Run] = []
    for number, (document, start) in enumerate(canvases):
        last = found[-1] if found else None
        if (
            last
            and (last.first + last.canvases, last.document + last.canvases, last.start) == (number, document, start)
            and documents[last.document] == documents[document]
        ):
            found[-1] = last._replace(canvases=last.canvases + 1)
        elif start:
            found.append(Run(number, 1, document, start))
    return tuple(found)


def parts(tokens: Tokens, window: int | None) -> Iterator[Part]:
    """All parts of a call; the first that a query meets does not merge."""
    if tokens.reads_clean:
        yield from _clean_parts(tokens, window)
    if not tokens.canvases:
        return
    own = Span(tokens.clean_total, len(tokens.canvases), tokens.length, 0, tokens.length)
    yield Part(own, own, merges=False)
    for number, run in enumerate(runs(tokens.documents, tokens.canvases)):
        begin, end = visible(run.start, window)
        if end > begin:
            queries = Span(own.offset + run.first * tokens.length, run.canvases, tokens.length, 0, tokens.length)
            clean = clean_keys(tokens, run, begin, end)
            is_slice = not (tokens.reads_clean or tokens.kept_whole)
            yield Part(queries, number if is_slice else clean, of_kept=tokens.kept_whole)


def clean_keys(tokens: Tokens, run: Run, begin: int, end: int) -> Span:
    return Span(tokens.offsets[run.document], run.canvases, tokens.documents[run.document], begin, end)


class _Home(NamedTuple):
    """Where the tokens of a document are."""

    length: int  # of this call
    room: int  # of its keys
    filled: int  # keys that were there before
    offset: int  # of its first token in the call
    begin: int  # of its first key


def _homes(tokens: Tokens) -> list[_Home]:
    lengths, cache = tokens.documents, tokens.cache
    rooms, filled = (cache.rooms, cache.filled) if cache else (lengths, (0,) * len(lengths))
    # without the totals at the ends
    offsets, begins = accumulate((0, *lengths[:-1])), accumulate((0, *rooms[:-1]))
    return list(starmap(_Home, zip(lengths, rooms, filled, offsets, begins, strict=True)))


def _clean_parts(tokens: Tokens, window: int | None) -> Iterator[Part]:
    """Clean tokens; or what goes behind a cache's, and reads its own keys there too."""
    homes, cache = _homes(tokens), tokens.cache
    for (length, _, before), alike in groupby(homes, key=lambda home: home[:3]):
        rows, end = list(alike), before + length
        found = _causal_parts(before, end, window or end, len(rows))
        if cache and cache.is_canvas:
            found = [_Piece((before, end), (visible(before, window)[0], end))]
        if length:
            yield from chain.from_iterable(_parts_of(piece, rows, cache is not None) for piece in found)
    images = sorted(tokens.images, key=lambda image: (image.begin, image.end, image.document))
    same = lambda pair: (pair[1].document - pair[0], pair[1][1:], homes[pair[1].document][:3])  # noqa: E731
    for _, neighbours in groupby(enumerate(images), key=same):
        alike = [image for _, image in neighbours]
        rows = [homes[image.document] for image in alike]
        for piece in image_parts(alike[0].begin, alike[0].end, window, tokens.image_rule):
            yield from _parts_of(piece, rows, cache is not None)


def _parts_of(piece: "_Piece", alike: Sequence[_Home], of_kept: bool) -> Iterator[Part]:
    """A piece of neighbouring documents that are alike: its rows are the documents; of blocks they are the blocks, a
    document at a time.
    """
    (q, q_end), (k, k_end), first = piece.queries, piece.keys, alike[0]
    if piece.blocks == 1:
        queries = Span(first.offset, len(alike), first.length, q - first.filled, q_end - first.filled)
        spans = [(queries, Span(first.begin, len(alike), first.room, k, k_end))]
    else:
        spans = [
            (
                Span(home.offset - home.filled + q, piece.blocks, piece.step, 0, q_end - q),
                Span(home.begin + k, piece.blocks, piece.step, 0, k_end - k),
            )
            for home in alike
        ]
    for queries, keys in spans:
        yield Part(queries, keys, of_kept, piece.causal, piece.backwards, piece.merges)


class _Piece(NamedTuple):
    """A part by its places in one document, or the first of such `blocks`, each `step` tokens behind the last."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    causal: bool = False
    backwards: bool = False
    merges: bool = False
    blocks: int = 1
    step: int = 1


def _causal_parts(first: int, length: int, window: int, documents: int) -> Iterator[_Piece]:
    """Tokens `first` to `length` of so many documents; those before are read already."""
    begin = first
    while begin < length:
        end = min(window if begin < window else begin + window, length)  # the first window sees all before it
        whole = min(length - begin, BLOCKS) // window if begin >= window else 0
        blocks = whole if whole > documents else 1  # the more rows, the fewer parts
        yield _Piece((begin, end), (begin, end), causal=True, blocks=blocks, step=window)
        # What its last query still sees of what lies before, all its queries see.
        if (last_sees := max(end - window, 0)) < begin:
            yield _Piece((begin, end), (last_sees, begin), merges=True)
        if begin >= window and end - begin > 1:
            keys = (begin - window + 1, end - window)
            yield _Piece((begin, end - 1), keys, True, backwards=True, merges=True, blocks=blocks, step=window)
        begin = end + (blocks - 1) * window


def image_parts(begin: int, end: int, window: int | None, rule: ImageRule) -> Iterator[_Piece]:
    """What an image's tokens see of it beside what they see as any clean token."""
    if end - begin > 1 and (window or rule == "generate"):
        yield _Piece((begin, end - 1), (begin + 1, end), causal=True, backwards=True, merges=True)
    if window and end - begin > window and rule == "generate":  # those that the window hides
        yield _Piece((begin + window, end), (begin, end - window), causal=True, merges=True)


@lru_cache(maxsize=256)
def plan(tokens: Tokens, window: int | None) -> tuple[Part, ...]:
    """All parts of a call, made once."""
    return tuple(parts(tokens, window))
