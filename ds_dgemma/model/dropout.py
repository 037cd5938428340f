"""LoRA's dropout in a sweep: drawn for each part of the tokens by itself, so that it falls alike in calls that hold
other parts beside it.

A layer's clean tokens are visited beside first guesses, its canvases alone, and in the backward pass both together
(`sweep.py`). Each part has a seed of the micro-batch, an adapter a key of its own; first guesses have no dropout.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

Sections = tuple[tuple[int, int | None], ...]  # tokens of a part, and its seed; None: nothing is dropped


class PartDropout:
    """The dropout of all adapters of a stack."""

    def __init__(self) -> None:
        self._sections: Sections | None = None

    @contextmanager
    def of(self, sections: Sections | None) -> Iterator[None]:
        """Within, inputs hold these parts, one after another; None: any tokens, torch's own draws."""
        before, self._sections = self._sections, sections
        try:
            yield
        finally:
            self._sections = before

    def __call__(self, inputs: Tensor, p: float, key: int) -> Tensor:
        """Drop elements of `inputs`, [..., tokens, features] with one row of tokens, with probability `p`."""
        if self._sections is None:
            return F.dropout(inputs, p) if torch.is_grad_enabled() else inputs
        parts = inputs.split([tokens for tokens, _ in self._sections], dim=-2)
        dropped = [
            part if seed is None else part * _mask(part, p, seed ^ key)
            for part, (_, seed) in zip(parts, self._sections, strict=True)
        ]
        return torch.cat(dropped, dim=-2)


def _mask(inputs: Tensor, p: float, seed: int) -> Tensor:
    generator = torch.Generator(inputs.device).manual_seed(seed)
    return torch.empty_like(inputs).bernoulli_(1 - p, generator=generator).div_(1 - p)
