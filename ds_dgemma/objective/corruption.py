"""Choose and corrupt canvases: every draw is keyed by (seed, purpose, epoch, sample, canvas), never by rank or step
order.

t is a noise level in (0, 1]: 0 keeps the text, 1 destroys it. Each supervised canvas token becomes, with
probability t, a uniform draw from the whole vocabulary (which may hit the right one); there is no mask token. Runs
on the CPU, in the loader's workers.

Shapes: L canvas tokens. Sources: gemma/diffusion `hackable_diffusion_adapter/hd/sft_model.py`, stage "corrupt"; NeMo
Automodel `recipes/dllm/train_ft.py` for noise that survives a change of ranks.
"""

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from ds_dgemma.config import ObjectiveSection
from ds_dgemma.data.batch import Example
from ds_dgemma.objective.schedules import noise_level


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

    objective: ObjectiveSection
    seed: int
    vocab_size: int
    pad_id: int

    def choose(self, example: Example, epoch: int) -> list[int]:
        """The scored canvases: uniform without replacement, in order."""
        wanted = self.objective.canvases_per_example
        if wanted == "all" or wanted >= example.canvases:
            return list(range(example.canvases))
        draw = generator(self.seed, "canvas", epoch, example.sample_id)
        chosen = draw.choice(example.canvases, size=wanted, replace=False)
        return sorted(int(canvas) for canvas in chosen)

    def corrupt(self, example: Example, epoch: int, canvas: int) -> NoisyCanvas:
        """Noise one canvas: a level t of the schedule, a uniform id for each token with probability t, a coin."""
        length = example.canvas_length
        start = example.prompt_length + canvas * length
        target = example.tokens_S[start : start + length].astype(np.int64)
        key = (epoch, example.sample_id, canvas)
        u = generator(self.seed, "level", *key).random()
        level = noise_level(self.objective.noise_schedule, u, self.objective.noise_eps, self.objective.noise_max)
        draw = generator(self.seed, "corruption", *key)
        replaced, ids = draw.random(length) < level, draw.integers(self.vocab_size, size=length)
        coin = generator(self.seed, "coin", *key).random() < self.objective.self_conditioning_probability
        return NoisyCanvas(start, target, np.where(replaced, ids, target), level, bool(coin))
