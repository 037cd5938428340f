"""A tokenized conversation as an `Example`: its answers cut into canvases, within `max_length`.

A canvas is a block of `canvas_length` tokens. An answer gets one EOS and is cut into canvases from its first token; its
last canvas is filled with EOS, and the fill is learned and attended like text: it teaches when to stop. The fill of the
last answer stands in the clean sequence too, so `max_length` is met or missed by whole canvases of that answer. Shapes:
S clean tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ds_dgemma.data.batch import Example, Span

OverLength = Literal["drop", "truncate", "error"]
ArTokens = Literal["all", "learned"]


@dataclass(frozen=True)
class LengthReport:
    """What the length policy did to a set of examples."""

    kept: int  # truncated ones included
    dropped: int
    truncated: int
    max_length: int

    def __str__(self) -> str:
        total = self.kept + self.dropped
        return (
            f"kept {self.kept:,} of {total:,} examples, dropped {self.dropped:,}, "
            f"truncated {self.truncated:,} (max_length {self.max_length:,})"
        )


def canvases_needed(answer_length, canvas_length: int):
    """Return how many canvases hold an answer (EOS counted); an integer or an array of them."""
    return -(-answer_length // canvas_length)


def canvases_kept(
    prompt_length, answer_length, canvas_length: int, max_length: int, over_length: OverLength
) -> np.ndarray:
    """Return how many canvases of the last answer are trained on, 0 for an example left out; integers or arrays."""
    needed = canvases_needed(answer_length, canvas_length)
    room = np.maximum((max_length - prompt_length) // canvas_length, 0)
    if over_length == "truncate":
        return np.minimum(needed, room)
    return np.where(needed <= room, needed, 0)


def too_long(prompt_length: int, answer_length: int, canvas_length: int, max_length: int) -> str:
    """Say how long an example is and what it would take to keep it."""
    canvases = canvases_needed(answer_length, canvas_length)
    return (
        f"prompt {prompt_length} + response {answer_length} (EOS counted) in {canvases} x {canvas_length} "
        f"= {prompt_length + canvases * canvas_length} tokens, over data.max_length {max_length}"
    )


def make_example(
    sample_id: int,
    ids: Sequence[int],
    spans: Sequence[Span],
    canvas_length: int,
    eos_id: int,
    canvases: int,
    ar_tokens: ArTokens = "all",
    scored_from: int = 1,
    starts_anywhere: bool = False,
) -> Example:
    """Lay out a document of tokens whose last span ends it, with `canvases` canvases for that span.

    `scored_from`: tokens before it are no targets of the AR loss, for another document of the row has them. A cut
    answer gets no EOS: it is not over.
    """
    last = spans[-1]
    end = last.start + canvases * canvas_length
    tokens_S = np.full(end, eos_id, dtype=np.int64)
    tokens_S[: min(end, len(ids))] = ids[:end]
    spans = (*spans[:-1], last._replace(end=min(end, last.end)))
    ar_weight_S = np.full(end, 1.0 if ar_tokens == "all" else 0.0, dtype=np.float32)
    for span in spans:
        ar_weight_S[span.start : span.end] = span.weight
    ar_weight_S[spans[-1].end :] = last.weight
    ar_weight_S[: max(scored_from, 1)] = 0.0
    return Example(sample_id, tokens_S, spans, ar_weight_S, canvas_length, eos_id, starts_anywhere)
