"""The masks are the rules, read token by token."""

import random
from dataclasses import dataclass

import pytest
import torch

from tests.reference.masks import CLEAN, PADDING, TokenLayout, attention_masks, clean_and_canvases


@dataclass(frozen=True)
class Token:
    """One token of a row, as `TokenLayout` describes it."""

    position: int
    document: int = 0
    canvas: int = CLEAN
    start: int = 0


def sees(query: Token, key: Token, window: int | None) -> bool:
    """The rules, one pair at a time; `window` is None on full layers."""
    if key.document == PADDING or query.document != key.document:
        return False
    if key.canvas != CLEAN:  # only its own tokens read a canvas, and all of them do
        return query.canvas == key.canvas
    if query.canvas != CLEAN:
        before = key.position < query.start
        return before and (window is None or key.position >= query.start - window + 1)
    behind = query.position - key.position
    return behind >= 0 and (window is None or behind < window)


def slow_mask(row: list[Token], window: int | None) -> list[list[bool]]:
    return [[query is key or sees(query, key, window) for key in row] for query in row]


def lay_out(rows: list[list[Token]]) -> TokenLayout:
    columns = (
        torch.tensor([[getattr(token, field) for token in row] for row in rows])
        for field in ("position", "document", "canvas", "start")
    )
    return TokenLayout(*columns)


def random_row(draw: random.Random, tokens: int) -> list[Token]:
    """Up to three documents, each with up to three canvases that may overlap; padding; all of it shuffled."""
    row: list[Token] = []
    canvases = 0
    for document in range(draw.randint(1, 3)):
        clean, length = draw.randint(1, 9), draw.randint(1, 5)
        row += [Token(position, document) for position in range(clean)]
        for _ in range(draw.randint(0, 3)):
            start = draw.randint(0, clean)
            row += [Token(start + offset, document, canvases, start) for offset in range(length)]
            canvases += 1
    row += [Token(position, PADDING) for position in range(tokens - len(row))]
    draw.shuffle(row)
    return row


@pytest.mark.parametrize("seed", range(20))
def test_masks_follow_the_rules_on_any_layout(seed: int):
    draw = random.Random(seed)
    rows = [random_row(draw, tokens=72) for _ in range(3)]
    window = draw.randint(1, 8)
    masks = attention_masks(lay_out(rows), window)
    assert masks["full_attention"][:, 0].tolist() == [slow_mask(row, None) for row in rows]
    assert masks["sliding_attention"][:, 0].tolist() == [slow_mask(row, window) for row in rows]


def test_the_worked_matrix_of_the_docstring_is_what_comes_out():
    layout = clean_and_canvases(torch.ones(1, 3, dtype=torch.bool), torch.tensor([[2]]), length=2)
    masks = attention_masks(layout, window=2)
    lines = (attention_masks.__doc__ or "").split("full_attention")[1].splitlines()[2:7]
    drawn = [[mark == "1" for mark in line.split() if mark in "1."] for line in lines]
    assert masks["full_attention"][0, 0].tolist() == [row[:5] for row in drawn]
    assert masks["sliding_attention"][0, 0].tolist() == [row[5:] for row in drawn]


def test_clean_tokens_come_first_and_every_canvas_continues_from_its_start():
    valid = torch.tensor([[True] * 5, [True, True, True, False, False]])
    layout = clean_and_canvases(valid, torch.tensor([[1, 3], [2, 0]]), length=2)
    assert layout.position_BT.tolist() == [[0, 1, 2, 3, 4, 1, 2, 3, 4], [0, 1, 2, 3, 4, 2, 3, 0, 1]]
    assert layout.document_BT.tolist() == [[0] * 9, [0, 0, 0, PADDING, PADDING, 0, 0, 0, 0]]
    assert layout.canvas_BT.tolist() == [[CLEAN] * 5 + [0, 0, 1, 1]] * 2
    assert layout.start_BT[:, 5:].tolist() == [[1, 1, 3, 3], [2, 2, 0, 0]]
    assert layout.is_canvas_BT.tolist() == [[False] * 5 + [True] * 4] * 2


def test_every_token_sees_something_so_that_no_softmax_is_empty():
    padding_only = clean_and_canvases(torch.zeros(1, 4, dtype=torch.bool), torch.tensor([[0]]), length=3)
    for mask in attention_masks(padding_only, window=1).values():
        assert mask.any(-1).all()
