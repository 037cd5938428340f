"""Examples made by hand."""

import numpy as np

from ds_dgemma.data.batch import Example, Span
from ds_dgemma.data.canvas import Cut


def one_answer(
    sample_id: int, tokens: np.ndarray, prompt: int, length: int, eos_id: int, weight: float = 1.0
) -> Example:
    """A prompt of so many tokens and an answer, in canvases of `length`."""
    cut = Cut(max_length=10**6, over_length="drop", canvas_length=length, eos_id=eos_id)
    return cut.example(sample_id, tokens, [Span(prompt, len(tokens), weight, 0)])
