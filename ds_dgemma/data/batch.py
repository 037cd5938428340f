"""Example and Batch: the two containers between data, objective and model.

Shapes: B examples, S clean tokens (prompt, response, EOS fill, then padding), K scored canvases per example, L
canvas tokens. A batch holds its noise already: the objective that reads it draws nothing.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch


@dataclass(frozen=True)
class Example:
    """One conversation as tokens: prompt, then a response filled with EOS to a whole number of canvases."""

    sample_id: int  # row of its source, the key of its noise: the same in every epoch and on any topology
    tokens_S: np.ndarray  # int64
    prompt_length: int  # tokens before the first canvas
    canvas_length: int

    @property
    def canvases(self) -> int:
        """How many canvases the response was cut into."""
        return (len(self.tokens_S) - self.prompt_length) // self.canvas_length


@dataclass(frozen=True)
class FirstPass:
    """Which examples the no-gradient pass runs on, and how much clean prefix it reads: host integers, so no device
    sync.
    """

    rows: tuple[int, ...]  # never empty: every rank runs the pass, so that its collectives stay in step
    prefix: int  # clean tokens kept, at least every chosen canvas's start


@dataclass(frozen=True)
class Batch:
    """A micro-batch, noise included."""

    clean_ids_BS: torch.Tensor  # int64
    clean_valid_BS: torch.Tensor  # bool, False on the padding at the right
    canvas_ids_BKL: torch.Tensor  # int64, noised
    target_ids_BKL: torch.Tensor  # int64, clean
    supervised_BKL: torch.Tensor  # bool
    canvas_start_BK: torch.Tensor  # int64, position of a canvas's first token
    self_condition_BK: torch.Tensor  # bool, the coin
    first_pass: FirstPass
    sample_ids: tuple[int, ...]
    noise_levels: tuple[tuple[float, ...], ...]  # [B][K]

    def to(self, device: torch.device | str) -> "Batch":
        """Copy the tensors to `device`."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **moved)

    @property
    def ar_pairs_BS(self) -> torch.Tensor:
        """Bool [B, S-1]: positions whose next token is scored by the AR loss (both of them real tokens)."""
        return self.clean_valid_BS[:, 1:] & self.clean_valid_BS[:, :-1]

    @property
    def is_real_BT(self) -> torch.Tensor:
        """Bool [B, S + K * L]: clean tokens and scored canvases' tokens, without padding."""
        scored_BKL = self.supervised_BKL.any(-1, keepdim=True).expand_as(self.supervised_BKL)
        return torch.cat([self.clean_valid_BS, scored_BKL.flatten(1)], dim=1)

    def counts(self) -> tuple[int, int]:
        """Tokens scored by the diffusion loss and by the AR loss."""
        return int(self.supervised_BKL.sum()), int(self.ar_pairs_BS.sum())

    def tokens(self) -> int:
        """Tokens read by the model, padding left out: clean ones, and those of scored canvases."""
        return int(self.is_real_BT.sum())
