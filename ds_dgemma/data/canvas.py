"""A turn as an `Example`: the prompt, then the response cut into canvases.

A canvas is a block of `canvas_length` tokens. The response gets one EOS and is cut into canvases from its
first token; the last is filled with EOS, and the fill is learned and attended like text: it teaches when to
stop. `max_length` counts prompt and canvases together, so it is met or missed by whole canvases. Shapes: S
clean tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ds_dgemma.data.batch import Example
from ds_dgemma.errors import UserError

OverLength = Literal["drop", "truncate", "error"]


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


def end_response(response_ids: Sequence[int], eos_id: int) -> list[int]:
    """Return the response with one EOS at its end, the one it has or a new one."""
    ended = len(response_ids) > 0 and response_ids[-1] == eos_id
    return [*response_ids] if ended else [*response_ids, eos_id]


def canvases_needed(response_length, canvas_length: int):
    """Return how many canvases hold a response (EOS counted); an integer or an array of them."""
    return -(-response_length // canvas_length)


def canvases_kept(
    prompt_length, response_length, canvas_length: int, max_length: int, over_length: OverLength
) -> np.ndarray:
    """Return how many canvases are trained on, 0 for an example left out; integers or arrays of them."""
    needed = canvases_needed(response_length, canvas_length)
    room = np.maximum((max_length - prompt_length) // canvas_length, 0)
    if over_length == "truncate":
        return np.minimum(needed, room)
    return np.where(needed <= room, needed, 0)


def too_long(prompt_length: int, response_length: int, canvas_length: int, max_length: int) -> str:
    """Say how long an example is and what it would take to keep it."""
    canvases = canvases_needed(response_length, canvas_length)
    return (
        f"prompt {prompt_length} + response {response_length} (EOS counted) in {canvases} x {canvas_length} "
        f"= {prompt_length + canvases * canvas_length} tokens, over data.max_length {max_length}"
    )


def make_example(
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    canvas_length: int,
    eos_id: int,
    sample_id: int,
    max_length: int,
    over_length: OverLength,
) -> Example | None:
    """Cut one turn into canvases; None if it is left out. A cut response gets no EOS: it is not over."""
    response = end_response(response_ids, eos_id)
    lengths = len(prompt_ids), len(response), canvas_length, max_length
    kept = int(canvases_kept(*lengths, over_length))
    if kept == 0:
        if over_length == "error":
            raise UserError(f"sample {sample_id}: {too_long(*lengths)}. Raise it, or set data.over_length.")
        return None
    room = kept * canvas_length
    fill = [eos_id] * (room - len(response))
    tokens_S = np.array([*prompt_ids, *response[:room], *fill], dtype=np.int64)
    return Example(sample_id, tokens_S, len(prompt_ids), canvas_length)
