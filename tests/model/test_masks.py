"""The masks are the rules, read token by token."""

import random
from dataclasses import dataclass

import pytest
import torch

from tests.reference.masks import CLEAN, NO_IMAGE, TokenLayout, attention_masks, clean_and_canvases


@dataclass(frozen=True)
class Token:
    """One token of a row, as `TokenLayout` describes it."""

    position: int
    document: int = 0
    canvas: int = CLEAN
    start: int = 0
    image: int = NO_IMAGE


def sees(query: Token, key: Token, window: int | None, rule: str = "generate") -> bool:
    """The rules, one pair at a time; `window` is None on full layers."""
    if query.image == key.image != NO_IMAGE and rule == "generate":
        return True
    if query.image == key.image != NO_IMAGE and window is not None and key.position > query.position:
        return True
    if query.document != key.document:
        return False
    if key.canvas != CLEAN:  # only its own tokens read a canvas, and all of them do
        return query.canvas == key.canvas
    if query.canvas != CLEAN:
        before = key.position < query.start
        return before and (window is None or key.position >= query.start - window + 1)
    behind = query.position - key.position
    return behind >= 0 and (window is None or behind < window)


def slow_mask(tokens: list[Token], window: int | None, rule: str = "generate") -> list[list[bool]]:
    return [[sees(query, key, window, rule) for key in tokens] for query in tokens]


def lay_out(tokens: list[Token]) -> TokenLayout:
    fields = ("position", "document", "canvas", "start", "image")
    return TokenLayout(*(torch.tensor([getattr(token, field) for token in tokens]) for field in fields))


def random_tokens(draw: random.Random) -> list[Token]:
    """Up to three documents, each with up to three canvases that may overlap; all of it shuffled."""
    tokens: list[Token] = []
    canvases = 0
    for document in range(draw.randint(1, 3)):
        clean, length = draw.randint(1, 9), draw.randint(1, 5)
        begin, end = sorted(draw.sample(range(clean + 1), 2))
        image = lambda position: document if begin <= position < end else NO_IMAGE  # noqa: B023, E731
        tokens += [Token(position, document, image=image(position)) for position in range(clean)]
        for _ in range(draw.randint(0, 3)):
            start = draw.randint(0, clean)
            tokens += [Token(start + offset, document, canvases, start) for offset in range(length)]
            canvases += 1
    draw.shuffle(tokens)
    return tokens


@pytest.mark.parametrize("seed", range(20))
def test_masks_follow_the_rules_on_any_layout(seed: int):
    draw = random.Random(seed)
    tokens, window = random_tokens(draw), draw.randint(1, 8)
    for rule in ("generate", "sliding"):
        masks = attention_masks(lay_out(tokens), window, rule)
        assert masks["full_attention"].tolist() == slow_mask(tokens, None, rule)
        assert masks["sliding_attention"].tolist() == slow_mask(tokens, window, rule)


def test_the_worked_matrix_of_the_docstring_is_what_comes_out():
    masks = attention_masks(clean_and_canvases([3], [(0, 2)], length=2), window=2)
    lines = (attention_masks.__doc__ or "").split("full_attention")[1].splitlines()[2:7]
    drawn = [[mark == "1" for mark in line.split() if mark in "1."] for line in lines]
    assert masks["full_attention"].tolist() == [row[:5] for row in drawn]
    assert masks["sliding_attention"].tolist() == [row[5:] for row in drawn]


def test_clean_tokens_come_first_and_every_canvas_continues_from_its_start():
    layout = clean_and_canvases([5, 3], [(0, 1), (0, 3), (1, 2)], length=2)
    assert layout.position_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 1, 2, 3, 4, 2, 3]
    assert layout.document_T.tolist() == [0] * 5 + [1] * 3 + [0] * 4 + [1] * 2
    assert layout.canvas_T.tolist() == [CLEAN] * 8 + [0, 0, 1, 1, 2, 2]
    assert layout.start_T[8:].tolist() == [1, 1, 3, 3, 2, 2]
    assert layout.is_canvas_T.tolist() == [False] * 8 + [True] * 6
