"""Noise levels are spread as the config says."""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import get_args

import numpy as np
import pytest

from ds_dgemma.config.run import NoiseSchedule, ObjectiveSection
from ds_dgemma.objective.corruption import Corruption, generator
from ds_dgemma.objective.schedules import SCHEDULES, noise_level
from tests.reference.examples import one_answer

# The share of levels up to t, between 0 and 1: by hand from the density that each source states.
CUMULATIVE: dict[str, Callable[[float], float]] = {
    "uniform": lambda t: t,
    "cosine": lambda t: 1 - 2 / math.pi * math.acos(t),  # P(cos(pi / 2 * r) <= t)
    "logit_normal": lambda t: NormalDist().cdf(math.log(t / (1 - t))),
}


def levels(schedule: str, eps: float, most: float, count: int = 3000) -> np.ndarray:
    """Those that as many canvases get, sorted."""
    section = ObjectiveSection(noise_schedule=schedule, noise_eps=eps, noise_max=most)  # pyright: ignore
    corruption = Corruption(section, seed=1, vocab_size=4)
    examples = [one_answer(sample, np.zeros(2), prompt=1, length=1, eos_id=0) for sample in range(count)]
    return np.sort([corruption.corrupt(example, 0, example.canvases[0]).noise_level for example in examples])


def test_every_schedule_of_the_config_is_there_and_tested():
    assert set(get_args(NoiseSchedule)) == set(SCHEDULES) == set(CUMULATIVE)


@pytest.mark.parametrize("schedule", CUMULATIVE)
@pytest.mark.parametrize(("eps", "most"), [(1e-3, 1.0), (0.2, 0.7)])
def test_the_levels_have_the_schedules_distribution(schedule: str, eps: float, most: float):
    seen = (levels(schedule, eps, most) - eps) / (most - eps)
    expected = np.array([CUMULATIVE[schedule](t) for t in seen])
    middle = (np.arange(len(seen)) + 0.5) / len(seen)
    assert np.abs(expected - middle).max() < 1.63 / math.sqrt(len(seen))  # Kolmogorov-Smirnov, 1 %


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("eps", "most"), [(0.0, 1.0), (1e-3, 1.0), (0.1, 0.3)])
def test_levels_rise_with_the_draw_from_the_least_to_the_largest(schedule: NoiseSchedule, eps: float, most: float):
    first, last = 0.0, 1 - 2**-53  # the draws of a generator
    draws = [first, 2**-53, *np.linspace(0.01, 0.99, 99).tolist(), last]
    seen = [noise_level(schedule, u, eps, most) for u in draws]
    assert seen == sorted(seen)
    assert seen[0] == eps
    assert most - 1e-3 < seen[-1] <= most


def test_uniform_levels_up_to_one_are_to_the_last_bit_those_before_there_were_schedules():
    for sample in range(200):
        u = generator(3, "level", 0, sample, 0).random()
        assert noise_level("uniform", u, 1e-3, 1.0) == 1e-3 + (1 - 1e-3) * u
