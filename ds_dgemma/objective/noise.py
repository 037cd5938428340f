"""Corrupt canvases and collate: every draw is keyed by (seed, purpose, epoch, sample, canvas), never by rank or
step order.

t is a noise level in (0, 1]: 0 keeps the text, 1 destroys it. Each supervised canvas token becomes, with
probability t, a uniform draw from the whole vocabulary (which may hit the right one); there is no mask token. Runs
on the CPU, in the loader's workers.

Shapes: L canvas tokens, K scored canvases. Sources: gemma/diffusion `hackable_diffusion_adapter/hd/sft_model.py`,
stage "corrupt"; NeMo Automodel `recipes/dllm/train_ft.py` for noise that survives a change of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import numpy as np
import torch

from ds_dgemma.config import ObjectiveSection
from ds_dgemma.data.batch import Batch, Example


def generator(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """A counter-based generator (Philox) that depends on nothing but its arguments."""
    digest = blake2b(repr((seed, purpose, *key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


@dataclass(frozen=True)
class NoisyCanvas:
    """One scored canvas with its noise."""

    start: int  # position of its first token
    target_L: np.ndarray  # int64, clean
    noised_L: np.ndarray  # int64
    noise_level: float
    self_condition: bool


@dataclass(frozen=True)
class Corruption:
    """Which canvases of an example are scored, and how they are noised: the objective's draws, all of them."""

    seed: int
    vocab_size: int
    noise_eps: float
    self_conditioning_probability: float
    canvases_per_example: int | Literal["all"]
    pad_id: int

    @classmethod
    def of(cls, seed: int, objective: ObjectiveSection, vocab_size: int, pad_id: int) -> "Corruption":
        """The draws of a run."""
        return cls(
            seed=seed,
            vocab_size=vocab_size,
            noise_eps=objective.noise_eps,
            self_conditioning_probability=objective.self_conditioning_probability,
            canvases_per_example=objective.canvases_per_example,
            pad_id=pad_id,
        )

    def choose(self, example: Example, epoch: int) -> list[int]:
        """The scored canvases: uniform without replacement, in order."""
        wanted = self.canvases_per_example
        if wanted == "all" or wanted >= example.canvases:
            return list(range(example.canvases))
        draw = generator(self.seed, "canvas", epoch, example.sample_id)
        chosen = draw.choice(example.canvases, size=wanted, replace=False)
        return sorted(int(canvas) for canvas in chosen)

    def corrupt(self, example: Example, epoch: int, canvas: int) -> NoisyCanvas:
        """Noise one canvas: a level t ~ U(eps, 1), a uniform id for each token with probability t, a coin."""
        length = example.canvas_length
        start = example.prompt_length + canvas * length
        target = example.tokens_S[start : start + length].astype(np.int64)
        key = (epoch, example.sample_id, canvas)
        level = self.noise_eps + (1 - self.noise_eps) * generator(self.seed, "level", *key).random()
        draw = generator(self.seed, "corruption", *key)
        replaced, ids = draw.random(length) < level, draw.integers(self.vocab_size, size=length)
        coin = generator(self.seed, "coin", *key).random() < self.self_conditioning_probability
        return NoisyCanvas(start, target, np.where(replaced, ids, target), level, bool(coin))

    def collate(self, examples: Sequence[tuple[Example, int]]) -> Batch:
        """Make the micro-batch of `(example, epoch)` pairs; the batch is the same whoever makes it."""
        canvases = [[self.corrupt(e, epoch, c) for c in self.choose(e, epoch)] for e, epoch in examples]
        rows = [example for example, _ in examples]
        B, K, L = len(rows), max(map(len, canvases)), rows[0].canvas_length
        S = max(len(example.tokens_S) for example in rows)

        clean_ids, clean_valid = np.full((B, S), self.pad_id), np.zeros((B, S), dtype=bool)
        ids, targets = np.full((B, K, L), self.pad_id), np.full((B, K, L), self.pad_id)
        supervised = np.zeros((B, K, L), dtype=bool)
        start, coin = np.zeros((B, K), dtype=np.int64), np.zeros((B, K), dtype=bool)
        for b, example in enumerate(rows):
            clean_ids[b, : len(example.tokens_S)] = example.tokens_S
            clean_valid[b, : len(example.tokens_S)] = True
            for k, canvas in enumerate(canvases[b]):
                ids[b, k], targets[b, k], supervised[b, k] = canvas.noised_L, canvas.target_L, True
                start[b, k], coin[b, k] = canvas.start, canvas.self_condition
        nobody = torch.empty(0, dtype=torch.int64)
        return Batch(
            clean_ids_BS=torch.from_numpy(clean_ids),
            clean_valid_BS=torch.from_numpy(clean_valid),
            canvas_ids_BKL=torch.from_numpy(ids),
            target_ids_BKL=torch.from_numpy(targets),
            supervised_BKL=torch.from_numpy(supervised),
            canvas_start_BK=torch.from_numpy(start),
            starts=tuple(tuple(row) for row in start.tolist()),
            guessed=(),
            guessed_M=nobody,
            coin_M=nobody.bool(),
            sample_ids=tuple(example.sample_id for example in rows),
            noise_levels=tuple(tuple(canvas.noise_level for canvas in row) for row in canvases),
        ).with_coins(torch.from_numpy(coin))
