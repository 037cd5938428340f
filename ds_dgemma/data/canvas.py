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

from ds_dgemma.data.batch import Example, Image, Span

OverLength = Literal["drop", "truncate", "error"]
ArTokens = Literal["all", "learned"]


@dataclass(frozen=True)
class Cut:
    """How an example is cut from a tokenized document."""

    max_length: int
    over_length: OverLength
    canvas_length: int
    eos_id: int
    ar_tokens: ArTokens = "all"

    def canvases_needed(self, answer_length):
        """Return how many canvases hold an answer (EOS counted); an integer or an array of them."""
        return -(-answer_length // self.canvas_length)

    def canvases_kept(self, prompt_length, answer_length) -> np.ndarray:
        """Return how many canvases of an answer have room behind its prompt, 0: it is left out; integers or arrays."""
        needed = self.canvases_needed(answer_length)
        room = np.maximum((self.max_length - prompt_length) // self.canvas_length, 0)
        return np.minimum(needed, room) if self.over_length == "truncate" else np.where(needed <= room, needed, 0)

    def too_long(self, prompt_length: int, answer_length: int) -> str:
        """Say how long an example is and what it would take to keep it."""
        canvases = self.canvases_needed(answer_length)
        return (
            f"prompt {prompt_length} + response {answer_length} (EOS counted) in {canvases} x {self.canvas_length} "
            f"= {prompt_length + canvases * self.canvas_length} tokens, over data.max_length {self.max_length}"
        )

    def text_tokens(self, prefix):
        """Tokens of running text in a document of whole canvases, behind a prefix; an integer or an array of them."""
        return (self.max_length - prefix) // self.canvas_length * self.canvas_length

    def example(
        self,
        sample_id: int,
        ids: np.ndarray,
        spans: Sequence[Span],
        scored_from: int = 1,
        is_cut: bool = False,
        starts_anywhere: bool = False,
        images: Sequence[Image] = (),
    ) -> Example:
        """Lay out a document whose last span ends it, filled with EOS to whole canvases of that span.

        `scored_from`: tokens before it are no targets of the AR loss, for another document of the row has them.
        `is_cut`: the last span goes on, and gets no EOS. Soft tokens of images are no targets of the AR loss.
        """
        last = spans[-1]
        length = len(ids) - last.start + (not is_cut and ids[-1] != self.eos_id)
        tokens_S = np.full(last.start + self.canvases_needed(length) * self.canvas_length, self.eos_id, dtype=np.int64)
        tokens_S[: len(ids)] = ids
        ar_weight_S = np.full(len(tokens_S), self.ar_tokens == "all", dtype=np.float32)
        for span in spans:
            ar_weight_S[span.start : span.end] = span.weight
        ar_weight_S[last.end :] = last.weight
        ar_weight_S[: max(scored_from, 1)] = 0.0
        seen = tuple(image for image in images if image.start < last.start)
        for image in seen:
            ar_weight_S[image.start : image.start + image.tokens] = 0.0
        length, eos = self.canvas_length, self.eos_id
        return Example(sample_id, tokens_S, tuple(spans), ar_weight_S, length, eos, is_cut, starts_anywhere, seen)
