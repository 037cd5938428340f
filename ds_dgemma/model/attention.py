"""Who attends to whom, in parts that need no mask.

The tokens of a call are one flat sequence, `[clean tokens of D documents, one behind another | C canvases of L]`:

- clean tokens see clean tokens of their document, causally, on sliding layers the last `window` of them (itself
  included);
- a canvas sees the clean tokens of its document before its start, on sliding layers the last `window - 1` of those, and
  all of itself. Nothing else reads a canvas, and nothing sees another document.

Each of these sets is cut into *parts*, rectangles and triangles of (queries, keys) that a kernel computes whole or
causally: no mask exists, nothing grows with S * S, and nothing is computed that nobody sees. A sliding layer goes in
blocks of a window, here 4 clean tokens in blocks of window 2 (c: causal part, t: triangle, read backwards):

        c . . .        A part gives its output o_i and the logarithm l_i of its softmax's sum. They merge into
        c c . .        l = log(sum exp l_i), o = sum of exp(l_i - l) o_i, and a part's own backward pass, given
        . t c .        the merged o and l, yields its share of the gradients: exact, as in Ring Attention
        . . c c        (arXiv 2310.01889) and FlashAttention 2 (arXiv 2307.08691).

Neighbours that are alike, documents of one length and canvases with as much before them, share a part.

Shapes: N tokens, S clean ones, h heads (g of keys and values), d head size, T tokens of a part.
`tests/reference/masks.py` has the same rules as dense masks. Sources: transformers `modeling_diffusion_gemma.py`
(`create_diffusion_decoder_attention_mask`, sliding cache); gemma/diffusion
`hackable_diffusion_adapter/hd/mask_helpers.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from ds_dgemma.model.kernel_choice import kernel_for
from ds_dgemma.model.kernels import Kernel

NAME = "ds_dgemma"
MASK = 2**24  # elements of a mask, at most
WANTED = "wanted_kernel"  # an attention module's setting, for `kernel_for`


class Cache(NamedTuple):
    """Where the documents of a call stand in a cache, which has all their keys and values, [room of all, g, d]. The
    call's go behind those that are there, and the call sees both.
    """

    rooms: tuple[int, ...]  # tokens that it has room for, of each
    filled: tuple[int, ...]  # clean tokens before the call's
    is_canvas: bool  # the call's tokens of a document are a canvas, not clean
    padding: tuple[int, ...] = ()  # first tokens of each that nothing sees; on a CPU only
    keys_only: bool = False  # nobody reads what else the layer makes of the tokens


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
            clean = _clean_keys(tokens, run, begin, end)
            is_slice = not (tokens.reads_clean or tokens.kept_whole)
            yield Part(queries, number if is_slice else clean, of_kept=tokens.kept_whole)


def _clean_keys(tokens: Tokens, run: Run, begin: int, end: int) -> Span:
    return Span(tokens.offsets[run.document], run.canvases, tokens.documents[run.document], begin, end)


def _clean_parts(tokens: Tokens, window: int | None) -> Iterator[Part]:
    """Clean tokens; or what goes behind a cache's, and reads its own keys there too."""
    cache = tokens.cache
    rooms, filled = (cache.rooms, cache.filled) if cache else (tokens.documents, (0,) * len(tokens.documents))
    offset = begin = 0
    for (length, room, before), alike in groupby(zip(tokens.documents, rooms, filled, strict=True)):
        rows, end = len(list(alike)), before + length
        found = _causal_parts(before, end, window or end)
        if cache and cache.is_canvas:
            found = [_Piece((before, end), (visible(before, window)[0], end))]
        for piece in found if length else ():
            (q, q_end), (k, k_end) = piece.queries, piece.keys
            yield Part(
                queries=Span(offset, rows, length, q - before, q_end - before),
                keys=Span(begin, rows, room, k, k_end),
                of_kept=cache is not None,
                causal=piece.causal,
                backwards=piece.backwards,
                merges=piece.merges,
            )
        offset, begin = offset + rows * length, begin + rows * room


class _Piece(NamedTuple):
    """A part by its places in one document."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    causal: bool = False
    backwards: bool = False
    merges: bool = False


def _causal_parts(first: int, length: int, window: int) -> Iterator[_Piece]:
    """Tokens `first` to `length`; those before are read already."""
    begin = first
    while begin < length:
        end = min(window if begin < window else begin + window, length)  # the first window sees all before it
        yield _Piece((begin, end), (begin, end), causal=True)
        # What its last query still sees of what lies before, all its queries see.
        if (last_sees := max(end - window, 0)) < begin:
            yield _Piece((begin, end), (last_sees, begin), merges=True)
        if begin >= window and end - begin > 1:
            keys = (begin - window + 1, end - window)
            yield _Piece((begin, end - 1), keys, causal=True, backwards=True, merges=True)
        begin = end


class Attended(NamedTuple):
    """What an attention leaves beside its output."""

    keys: Tensor  # [N, g, d]
    values: Tensor  # [N, g, d]
    output: Tensor  # [N, h, d]
    normaliser: Tensor  # [N, h], logarithm of the softmax's sum


def keep_all(attended: Attended, tokens: Tokens) -> list[Tensor]:
    """All clean keys and values, [S, g, d], for `attention`."""
    return [flat[: tokens.clean_total] for flat in (attended.keys, attended.values)]


def keep(attended: Attended, tokens: Tokens, canvases: tuple[Canvas, ...], window: int | None) -> list[Tensor]:
    """The clean keys and values that `canvases` see, for `attention`: copies of slices, two for each run of canvases,
    [rows, T, g, d]; or all of them, where that is less.
    """
    all_clean, slices = keep_all(attended, tokens), []
    for run in runs(tokens.documents, canvases):
        seen = _clean_keys(tokens, run, *visible(run.start, window))
        slices += [seen.of(flat).transpose(1, 2) for flat in all_clean]
    if sum(kept.numel() for kept in slices) < sum(flat.numel() for flat in all_clean):
        return [kept.clone() for kept in slices]
    return all_clean


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernel: Kernel,
        todo: tuple[Part, ...],
        scale: float,
        known: tuple[Tensor, Tensor] | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *kept: Tensor,
    ):
        ctx.kernel, ctx.todo, ctx.scale = kernel, todo, scale
        output, normaliser = known or _forward(kernel, todo, scale, query, key, value, kept)
        ctx.save_for_backward(query, key, value, output, normaliser, *kept)
        ctx.mark_non_differentiable(normaliser)
        return output, normaliser

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, output, normaliser, *kept = ctx.saved_tensors
        # In fp32 at least: a key has a share of every canvas behind it, and bf16 would lose the last ones.
        wide = normaliser.dtype
        totals = [torch.zeros_like(tensor, dtype=wide) for tensor in (query, key, value, *kept)]
        d_query, d_key, d_value, *d_kept = totals
        lines = normaliser.unsqueeze(-1)
        for part in ctx.todo:
            at = part.queries.of
            keys, values = _keys(part, key, value, kept)
            inputs = (at(grads[0]), at(query), keys, values, at(output), at(lines))
            if part.backwards:
                inputs = tuple(tensor.flip(2) for tensor in inputs)
            found = ctx.kernel.backward(*inputs[:5], inputs[5].squeeze(-1), part.causal, ctx.scale)
            if part.backwards:
                found = tuple(tensor.flip(2) for tensor in found)
            for total, share in zip((at(d_query), *_keys(part, d_key, d_value, d_kept)), found, strict=True):
                total.add_(share)
        return None, None, None, None, *(total.to(query.dtype) for total in totals)


def _keys(part: Part, key: Tensor, value: Tensor, kept: Any) -> tuple[Tensor, Tensor]:
    """Views of a part's keys and values, [rows, g, T, d]."""
    if isinstance(part.keys, Span):
        keys, values = kept if part.of_kept else (key, value)
        return part.keys.of(keys), part.keys.of(values)
    return kept[2 * part.keys].transpose(1, 2), kept[2 * part.keys + 1].transpose(1, 2)


def _forward(
    kernel: Kernel, todo: tuple[Part, ...], scale: float, query: Tensor, key: Tensor, value: Tensor, kept: Any
) -> tuple[Tensor, Tensor]:
    """Output [N, h, d] and normaliser [N, h]."""
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lines = torch.empty(*query.shape[:2], 1, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    for part in todo:
        inputs = (part.queries.of(query), *_keys(part, key, value, kept))
        if part.backwards:
            inputs = tuple(tensor.flip(2) for tensor in inputs)
        out, log = kernel.forward(*inputs, part.causal, scale)
        log = log.unsqueeze(-1)
        if part.backwards:
            out, log = out.flip(2), log.flip(2)
        whole, line = part.queries.of(output), part.queries.of(lines)
        if part.merges:
            share = torch.sigmoid(log - line)
            out = torch.lerp(whole.to(share.dtype), out.to(share.dtype), share)
            log = torch.logaddexp(line, log)
        whole.copy_(out)
        line.copy_(log)
    return output, lines.squeeze(-1)


def _write(tokens: Tokens, kept: list[Tensor], new: list[Tensor]) -> None:
    """Put the keys and values of a call's tokens behind those that a cache holds; an empty one is made."""
    assert tokens.cache is not None
    if not kept:
        kept += [flat.new_empty(sum(tokens.cache.rooms), *flat.shape[1:]) for flat in new]
    read = begin = 0
    for length, room, filled in zip(tokens.documents, *tokens.cache[:2], strict=True):
        for whole, flat in zip(kept, new, strict=True):
            whole.narrow(0, begin + filled, length).copy_(flat.narrow(0, read, length))
        read, begin = read + length, begin + room


def _is_short(documents: tuple[int, ...], filled: tuple[int, ...]) -> bool:
    return max(documents) * max(map(sum, zip(documents, filled, strict=True))) <= MASK


def _masked(tokens: Tokens, window: int | None, query: Tensor, kept: list[Tensor], scale: float) -> Tensor:
    """The output [N, h, d] of a call that a cache serves, a document at a time and in one piece, so that a CPU rounds
    as it does for transformers: one bit more or less is another token some steps later.
    """
    cache, output, (key, value) = tokens.cache, torch.empty_like(query), kept
    assert cache is not None
    offset = begin = 0
    unseen = cache.padding or (0,) * len(tokens.documents)
    for length, room, before, padding in zip(tokens.documents, *cache[:2], unseen, strict=True):
        end = before + length
        first, mask = visible(before, window)[0], None
        if padding or not cache.is_canvas:
            place = torch.arange(end)
            distance = place[before:, None] - place[first:]
            mask = (distance >= 0) & (distance < (window or end)) | torch.tensor(cache.is_canvas)
            mask &= place[first:] >= padding
        if length:
            at = (slice(offset, offset + length), slice(begin + first, begin + end))
            q, k, v = (
                flat[part].transpose(0, 1)[None] for flat, part in ((query, at[0]), (key, at[1]), (value, at[1]))
            )
            found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
            output[at[0]] = found[0].transpose(0, 1)
        offset, begin = offset + length, begin + room
    return output


@lru_cache(maxsize=256)
def _plan(tokens: Tokens, window: int | None) -> tuple[Part, ...]:
    return tuple(parts(tokens, window))


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    tokens: Tokens,
    kept: list[Tensor] | None = None,
    known: tuple[Tensor, Tensor] | None = None,
    scaling: float,
    sliding_window: int | None,
    **_: Any,
) -> tuple[Tensor, Attended]:
    """transformers' attention interface, for one flat sequence: query [1, h, N, d], key and value [1, g, N, d].

    Returns the output, [1, N, h, d], and what may be used again. `kept`: keys and values by `keep`, for a call without
    clean tokens, or those of a cache, which `tokens.cache` says how to fill; `known`: output and normaliser that an
    earlier call computed of the very same.
    """
    flat = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    if tokens.cache is not None and kept is not None:
        _write(tokens, kept, flat[1:])
        if tokens.cache.keys_only:
            return torch.zeros_like(query).transpose(1, 2), Attended(flat[1], flat[2], flat[0], flat[0].new_empty(0))
    if kept and kept[0].ndim == 3:
        tokens = replace(tokens, kept_whole=True)
    queries, keys, values = flat
    if tokens.cache is not None and kept and not query.is_cuda and _is_short(tokens.documents, tokens.cache.filled):
        output = _masked(tokens, sliding_window, queries, kept, scaling)
        return output.unsqueeze(0), Attended(keys, values, output, output.new_empty(0))
    todo = _plan(tokens, sliding_window)
    kernel = kernel_for(getattr(module, WANTED, "auto"), queries, keys)
    output, normaliser = _Attend.apply(kernel, todo, scaling, known, queries, keys, values, *(kept or ()))
    return output.unsqueeze(0), Attended(keys, values, output, normaliser)


AttentionInterface.register(NAME, attention)
