"""Attention over the parts of one flat sequence (`parts.py`): clean tokens causally, each canvas over what it may see.

A part gives its output o_i and the logarithm l_i of its softmax's sum. They merge into l = log(sum exp l_i), o = sum of
exp(l_i - l) o_i, and a part's own backward pass, given the merged o and l, yields its share of the gradients: exact, as
in Ring Attention (arXiv 2310.01889) and FlashAttention 2 (arXiv 2307.08691).

Shapes: N tokens, S clean ones, h heads (g of keys and values), d head size, T tokens of a part.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from ds_dgemma.model.kernel_choice import kernel_for
from ds_dgemma.model.kernels import Kernel
from ds_dgemma.model.parts import Canvas, Part, Span, Tokens, clean_keys, plan, runs, visible

NAME = "ds_dgemma"
MASK = 2**24  # elements of a mask, at most
WANTED = "wanted_kernel"  # an attention module's setting, for `kernel_for`


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
        seen = clean_keys(tokens, run, *visible(run.start, window))
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
        d_query = torch.empty_like(query, dtype=wide)
        d_key, d_value, *d_kept = d_keys = [torch.zeros_like(tensor, dtype=wide) for tensor in (key, value, *kept)]
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
            put = Tensor.add_ if part.merges else Tensor.copy_
            put(at(d_query), found[0])
            for total, share in zip(_keys(part, d_key, d_value, d_kept), found[1:], strict=True):
                total.add_(share)
        return None, None, None, None, *(total.to(query.dtype) for total in (d_query, *d_keys))


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
    for document, (length, room, before) in enumerate(zip(tokens.documents, *cache[:2], strict=True)):
        first, end = visible(before, window)[0], before + length
        if length:
            at = (slice(offset, offset + length), slice(begin + first, begin + end))
            q, k, v = (
                flat[part].transpose(0, 1)[None] for flat, part in ((query, at[0]), (key, at[1]), (value, at[1]))
            )
            mask = _mask(tokens, document, window)
            found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
            output[at[0]] = found[0].transpose(0, 1)
        offset, begin = offset + length, begin + room
    return output


def _mask(tokens: Tokens, document: int, window: int | None) -> Tensor | None:
    """Which of a document's keys its tokens of this call see, bool [T, keys]; None: all."""
    cache = tokens.cache
    assert cache is not None
    before, padding = cache.filled[document], cache.padding[document] if cache.padding else 0
    if cache.is_canvas and not padding:
        return None
    end = before + tokens.documents[document]
    query, key = torch.arange(before, end)[:, None], torch.arange(visible(before, window)[0], end)
    sees = (key <= query) & (key > query - (window or end)) | torch.tensor(cache.is_canvas)
    for image in tokens.images:
        if image.document == document and (window or tokens.image_rule == "generate"):
            inside = [(place >= image.begin) & (place < image.end) for place in (query, key)]
            behind = key > (query if tokens.image_rule == "sliding" else -1)
            sees |= inside[0] & inside[1] & behind
    return sees & (key >= padding)


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
    todo = plan(tokens, sliding_window)
    kernel = kernel_for(getattr(module, WANTED, "auto"), queries, keys)
    output, normaliser = _Attend.apply(kernel, todo, scaling, known, queries, keys, values, *(kept or ()))
    return output.unsqueeze(0), Attended(keys, values, output, normaliser)


AttentionInterface.register(NAME, attention)
