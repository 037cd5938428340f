"""Choose and corrupt canvases: every draw is keyed by (seed, purpose, epoch, row, span, canvas), never by rank or
step order.

t is a noise level in (0, 1]: 0 keeps the text, 1 destroys it. Each supervised canvas token becomes, with
probability t, a uniform draw from the whole vocabulary (which may hit the right one); there is no mask token. Runs
on the CPU, in the loader's workers.

Shapes: L canvas tokens. Sources: gemma/diffusion `hackable_diffusion_adapter/hd/sft_model.py`, stage "corrupt"; NeMo
Automodel `recipes/dllm/train_ft.py` for noise that survives a change of ranks.
"""

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from ds_dgemma.config.run import ObjectiveSection
from ds_dgemma.data.batch import Example, Place
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
    weight: float
    noise_level: float
    self_condition: bool


@dataclass(frozen=True)
class Corruption:
    """Which canvases of an example are scored, and how they are noised: the objective's draws, all of them."""

    objective: ObjectiveSection
    seed: int
    vocab_size: int

    def choose(self, example: Example, epoch: int) -> list[Place]:
        """The scored canvases, over all spans: uniform without replacement, in order."""
        key = (epoch, example.sample_id, example.spans[-1].number)
        canvases = example.canvases
        if example.starts_anywhere:
            shift = int(generator(self.seed, "shift", *key).integers(example.canvas_length))
            canvases = example.canvases_from(shift)
        wanted = self.objective.canvases_per_example
        if wanted == "all" or wanted >= len(canvases):
            return list(canvases)
        chosen = generator(self.seed, "canvas", *key).choice(len(canvases), size=wanted, replace=False)
        return [canvases[int(number)] for number in sorted(chosen)]

    def canvases(self, example: Example, epoch: int) -> list[NoisyCanvas]:
        """The scored canvases with their noise."""
        return [self.corrupt(example, epoch, place) for place in self.choose(example, epoch)]

    def corrupt(self, example: Example, epoch: int, place: Place, level: float | None = None) -> NoisyCanvas:
        """Noise one canvas: a uniform id for each token with probability t, a coin; t is `level`, or drawn by the
        schedule.
        """
        length, span = example.canvas_length, example.spans[place.span]
        target = example.target_L(place)
        key = (epoch, example.sample_id, span.number, place.number)
        if level is None:
            u = generator(self.seed, "level", *key).random()
            level = noise_level(self.objective.noise_schedule, u, self.objective.noise_eps, self.objective.noise_max)
        draw = generator(self.seed, "corruption", *key)
        replaced, ids = draw.random(length) < level, draw.integers(self.vocab_size, size=length)
        coin = generator(self.seed, "coin", *key).random() < self.objective.self_conditioning_probability
        return NoisyCanvas(place.start, target, np.where(replaced, ids, target), span.weight, level, bool(coin))


@dataclass(frozen=True)
class NoiseGrid(Corruption):
    """The same canvases at each of some noise levels: the tokens that a level replaces, a higher one does too."""

    levels: tuple[float, ...]

    def canvases(self, example: Example, epoch: int) -> list[NoisyCanvas]:
        """Each chosen canvas once a level, in the order of the levels."""
        places = self.choose(example, epoch)
        return [self.corrupt(example, epoch, place, level) for place in places for level in self.levels]
