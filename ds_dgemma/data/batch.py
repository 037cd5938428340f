"""Example and Batch: the two containers between data, objective and model.

Shapes: B examples, S clean tokens (prompt, response, EOS fill, then padding), K scored canvases per example, L
canvas tokens, M canvases of all examples that get a first guess. A batch holds its noise already: the objective that
reads it draws nothing. What decides the shape of a computation is there as host integers too, so no device is asked.
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
class Batch:
    """A micro-batch, noise included."""

    clean_ids_BS: torch.Tensor  # int64
    clean_valid_BS: torch.Tensor  # bool, False on the padding at the right
    canvas_ids_BKL: torch.Tensor  # int64, noised
    target_ids_BKL: torch.Tensor  # int64, clean
    supervised_BKL: torch.Tensor  # bool
    canvas_start_BK: torch.Tensor  # int64, position of a canvas's first token
    noise_level_BK: torch.Tensor  # fp32, probability that a canvas's token was drawn anew
    starts: tuple[tuple[int, ...], ...]  # [B][K], canvas_start_BK on the host
    # The canvases that get a first guess, numbered among B * K: those whose self-conditioning coin is true, or the
    # first, whose guess counts for nothing, so that every rank makes one and collectives stay in step
    guessed: tuple[int, ...]  # on the host
    guessed_M: torch.Tensor  # int64, the same
    coin_M: torch.Tensor  # bool
    sample_ids: tuple[int, ...]
    noise_levels: tuple[tuple[float, ...], ...]  # of the scored canvases of each example, to the last bit, on the host

    def with_coins(self, coin_BK: torch.Tensor) -> "Batch":
        """The same batch with other self-conditioning coins, bool [B, K] on the CPU."""
        guessed = tuple(coin_BK.flatten().nonzero().flatten().tolist()) or (0,)
        guessed_M = torch.tensor(guessed)
        return replace(self, guessed=guessed, guessed_M=guessed_M, coin_M=coin_BK.flatten()[guessed_M])

    @property
    def self_condition_BK(self) -> torch.Tensor:
        """Bool [B, K]: the coins."""
        coins = torch.zeros_like(self.canvas_start_BK, dtype=torch.bool).flatten()
        return coins.index_copy(0, self.guessed_M, self.coin_M).view_as(self.canvas_start_BK)

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
    def is_real_N(self) -> torch.Tensor:
        """Bool [B * S + B * K * L]: all clean tokens, then all canvases' tokens, False on padding."""
        scored_BKL = self.supervised_BKL.any(-1, keepdim=True).expand_as(self.supervised_BKL)
        return torch.cat([self.clean_valid_BS.flatten(), scored_BKL.flatten()])

    def counts(self) -> tuple[int, int]:
        """Tokens scored by the diffusion loss and by the AR loss."""
        return int(self.supervised_BKL.sum()), int(self.ar_pairs_BS.sum())

    def tokens(self) -> int:
        """Tokens read by the model, padding left out: clean ones, and those of scored canvases."""
        return int(self.is_real_N.sum())
