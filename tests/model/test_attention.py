"""Attention in parts equals softmax under the dense masks, for any documents, canvases, starts and window; float64."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ds_dgemma.model.attention import Attended, attention, keep, keep_all
from ds_dgemma.model.parts import Canvas, Image, Tokens, parts
from tests.reference.masks import attention_masks, clean_and_canvases

HEADS, KV_HEADS, SIZE = 4, 2, 8


def draw(seed: int) -> tuple[Tokens, int]:
    """Documents, some of one length; canvases that start anywhere (at 0, at the very end, together); and a window."""
    pick = random.Random(seed)
    lengths = [pick.randint(3, 40) for _ in range(2)]
    documents = tuple(pick.choice(lengths) for _ in range(pick.randint(1, 4)))
    canvases = []
    for document, clean in enumerate(documents):
        start = lambda: pick.choice([0, 2, clean - 1, clean, clean // 2, pick.randint(0, clean)])  # noqa: B023, E731
        canvases += [Canvas(document, start()) for _ in range(pick.randint(0, 2))]
    canvases = canvases or [Canvas(0, 1)]
    borders = [sorted(pick.sample(range(clean + 1), 2 * pick.randint(0, 1 + (clean > 2)))) for clean in documents]
    images = [
        Image(document, *pair) for document, at in enumerate(borders) for pair in zip(at[::2], at[1::2], strict=True)
    ]
    rule = pick.choice(["generate", "sliding"])
    tokens = Tokens(documents, tuple(canvases), pick.randint(1, 6), images=tuple(images), image_rule=rule)
    return tokens, pick.choice([1, 2, 3, 5, 8, lengths[0], 50])


def attend(tokens: Tokens, window: int | None, inputs: list[Tensor], **more) -> tuple[Tensor, Attended]:
    """Our attention, on [N, heads, d]."""
    laid = [tensor.transpose(0, 1)[None] for tensor in inputs]
    output, attended = attention(
        torch.nn.Module(), *laid, None, tokens=tokens, scaling=0.7, sliding_window=window, **more
    )
    return output[0], attended


def under_a_mask(mask: Tensor, inputs: list[Tensor]) -> Tensor:
    """Softmax attention of [clean | canvases] under its dense mask; on [N, heads, d]."""
    query, key, value = (flat.transpose(0, 1).repeat_interleave(HEADS // flat.shape[1], dim=0) for flat in inputs)
    scores = 0.7 * query @ key.transpose(-1, -2)
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).transpose(0, 1)


ALIKE = Tokens((13, 13, 13, 13), (Canvas(0, 9), Canvas(1, 9), Canvas(3, 13)), 2), 4  # more documents than whole blocks


@pytest.mark.parametrize("drawn", [*map(draw, range(40)), ALIKE])
def test_parts_equal_dense_masks_and_kept_keys_equal_those_in_the_call(drawn: tuple[Tokens, int]):
    tokens, window = drawn
    torch.manual_seed(0)
    count = tokens.clean_total + len(tokens.canvases) * tokens.length
    inputs = [torch.randn(count, n, SIZE, dtype=torch.float64, requires_grad=True) for n in (HEADS, KV_HEADS, KV_HEADS)]
    layout = clean_and_canvases(tokens.documents, tokens.canvases, tokens.length, tokens.images)
    masks = attention_masks(layout, window, tokens.image_rule)
    for kind, limit in (("full_attention", None), ("sliding_attention", window)):
        output, attended = attend(tokens, limit, inputs)
        expected = under_a_mask(masks[kind], inputs)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
        direction = torch.randn_like(output)
        seen, wanted = (torch.autograd.grad(out, inputs, direction, retain_graph=True) for out in (output, expected))
        torch.testing.assert_close(seen, wanted, rtol=0, atol=1e-12)

        # Canvases alone, on keys and values kept from a call before; and a call that is told what came out
        alone = replace(tokens, reads_clean=False)
        of_canvases = [tensor[tokens.clean_total :] for tensor in inputs]
        for kept in (keep(attended, tokens, tokens.canvases, limit), keep_all(attended, tokens)):
            seen, _ = attend(alone, limit, of_canvases, kept=kept)
            torch.testing.assert_close(seen, expected[tokens.clean_total :], rtol=0, atol=1e-12)
            alone_only = direction.index_fill(0, torch.arange(tokens.clean_total), 0.0)
            of_kept = torch.autograd.grad(seen, inputs, alone_only[tokens.clean_total :], allow_unused=True)
            of_all = torch.autograd.grad(expected, inputs, alone_only, retain_graph=True)
            torch.testing.assert_close(of_kept, of_all, rtol=0, atol=1e-12)
        told, _ = attend(tokens, limit, inputs, known=(attended.output, attended.normaliser))
        torch.testing.assert_close(torch.autograd.grad(told, inputs, direction), wanted, rtol=0, atol=1e-12)


def test_a_sliding_layer_does_no_more_than_its_window_asks_for_in_few_parts():
    window, clean, length = 16, 256, 8
    tokens = Tokens((clean,), (Canvas(0, 200),), length)
    area, found = 0, list(parts(tokens, window))
    for part in found:
        queries = part.queries.end - part.queries.begin
        keys = 15 if isinstance(part.keys, int) else part.keys.end - part.keys.begin
        area += part.queries.rows * (queries * (queries + 1) // 2 if part.causal else queries * keys)
    visible = attention_masks(clean_and_canvases([clean], [(0, 200)], length), window)["sliding_attention"]
    assert area == int(visible.sum())
    assert len(found) == 5  # the first block; of all others the square and the triangle; the canvas, and what it sees


def test_a_keys_gradient_has_a_share_of_every_canvas_in_bf16_too():
    """Shares of one sign, too small for bf16 to add to what is there already."""
    clean, length, count = 8, 4, 200
    tokens = Tokens((clean,), tuple(Canvas(0, clean) for _ in range(count)), length)
    torch.manual_seed(0)
    total = clean + count * length
    inputs = [torch.randn(total, n, SIZE) for n in (HEADS, KV_HEADS, KV_HEADS)]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [tensor.bfloat16().to(dtype).requires_grad_() for tensor in inputs]
        output, _ = attend(tokens, None, leaves)
        output.backward(torch.ones_like(output))
        found.append(leaves[2].grad[:clean].float().sum())
    torch.testing.assert_close(found[1], found[0], rtol=2e-3, atol=0)
