"""The noise has the stated distribution, and depends on the sample and nothing else."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from ds_dgemma.config.run import ObjectiveSection
from ds_dgemma.data.batch import Example, Place
from ds_dgemma.objective.corruption import Corruption, NoisyCanvas
from tests.reference.examples import one_answer

VOCABULARY, LENGTH = 40, 32
OUTSIDE = VOCABULARY  # a clean id that no draw can hit, so that every replaced token shows


def make_corruption(seed: int = 7, **objective) -> Corruption:
    return Corruption(ObjectiveSection(**objective), seed, VOCABULARY)


def make_example(sample_id: int, canvases: int = 1, prompt: int = 3, length: int = LENGTH) -> Example:
    return one_answer(sample_id, np.full(prompt + canvases * length, OUTSIDE), prompt, length, eos_id=OUTSIDE)


def corrupt(corruption: Corruption, sample_id: int, epoch: int = 0, canvas: int = 0, **example) -> NoisyCanvas:
    made = make_example(sample_id, **example)
    return corruption.corrupt(made, epoch, made.canvases[canvas])


def numbers(places: list[Place]) -> list[int]:
    return [place.number for place in places]


@pytest.fixture(scope="module")
def many() -> list[NoisyCanvas]:
    """3,000 canvases of as many samples."""
    return [corrupt(make_corruption(), sample) for sample in range(3000)]


def assert_frequencies(counts: list[int], expected: list[float]) -> None:
    """Pearson's chi-square within 4 standard deviations of what chance gives."""
    statistic = sum((count - mean) ** 2 / mean for count, mean in zip(counts, expected, strict=True))
    freedom = len(counts) - 1
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom) + 4, f"chi-square {statistic} for {freedom}"


def test_seed_epoch_sample_and_canvas_each_give_other_noise():
    canvases = [
        corrupt(make_corruption(seed=seed), sample, epoch, canvas, canvases=2).noised_L.tolist()
        for seed, epoch, sample, canvas in itertools.product((0, 1), repeat=4)
    ]
    assert all(one != other for one, other in itertools.combinations(canvases, 2))


def test_the_noise_level_is_uniform(many: list[NoisyCanvas]):
    level = np.sort([canvas.noise_level for canvas in many])
    assert level[0] >= 1e-3
    assert level[-1] < 1
    expected = 1e-3 + (1 - 1e-3) * (np.arange(len(level)) + 0.5) / len(level)
    assert np.abs(level - expected).max() < 1.63 / math.sqrt(len(level))  # Kolmogorov-Smirnov, 1 %


def test_the_noise_level_starts_at_eps():
    levels = [corrupt(make_corruption(noise_eps=0.75), sample).noise_level for sample in range(400)]
    assert 0.75 <= min(levels) < 0.76
    assert 0.99 < max(levels) < 1


def test_a_token_is_replaced_with_the_probability_of_its_level(many: list[NoisyCanvas]):
    for low, high in itertools.pairwise((0.0, 0.1, 0.3, 0.6, 0.9, 1.0)):
        some = [canvas for canvas in many if low <= canvas.noise_level < high]
        replaced = sum(int((canvas.noised_L != canvas.target_L).sum()) for canvas in some)
        mean = sum(LENGTH * canvas.noise_level for canvas in some)
        variance = sum(LENGTH * canvas.noise_level * (1 - canvas.noise_level) for canvas in some)
        assert abs(replaced - mean) < 4 * math.sqrt(variance)


def test_replacement_does_not_depend_on_the_place_in_the_canvas(many: list[NoisyCanvas]):
    replaced = np.stack([canvas.noised_L != canvas.target_L for canvas in many])
    assert_frequencies(replaced.sum(0).tolist(), [replaced.sum() / LENGTH] * LENGTH)


def test_replacements_are_uniform_over_the_whole_vocabulary(many: list[NoisyCanvas]):
    ids = np.concatenate([canvas.noised_L[canvas.noised_L != OUTSIDE] for canvas in many])
    counts = np.bincount(ids, minlength=VOCABULARY)
    assert len(counts) == VOCABULARY  # pad, end of sequence and all others, and nothing beyond
    assert_frequencies(counts.tolist(), [len(ids) / VOCABULARY] * VOCABULARY)


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.5, 1.0])
def test_the_coin_has_its_probability(probability: float):
    corruption = make_corruption(self_conditioning_probability=probability)
    heads = sum(corrupt(corruption, sample).self_condition for sample in range(3000))
    assert abs(heads - 3000 * probability) <= 4 * math.sqrt(3000 * probability * (1 - probability))


def test_the_coin_is_independent_of_the_level(many: list[NoisyCanvas]):
    level, coin = ([getattr(canvas, field) for canvas in many] for field in ("noise_level", "self_condition"))
    assert abs(np.corrcoef(level, coin)[0, 1]) < 4 / math.sqrt(len(many))


@pytest.mark.parametrize("k", [1, 2])
def test_scored_canvases_are_uniform_without_replacement(k: int):
    corruption, draws = make_corruption(canvases_per_example=k), 3000
    counts = Counter(tuple(numbers(corruption.choose(make_example(sample, canvases=5), 0))) for sample in range(draws))
    subsets = list(itertools.combinations(range(5), k))
    assert set(counts) <= set(subsets)
    assert_frequencies([counts[subset] for subset in subsets], [draws / len(subsets)] * len(subsets))


@pytest.mark.parametrize("canvases_per_example", ["all", 3, 9])
def test_all_canvases_are_scored_when_there_are_no_more(canvases_per_example: int | str):
    corruption = make_corruption(canvases_per_example=canvases_per_example)
    assert numbers(corruption.choose(make_example(5, canvases=3), epoch=1)) == [0, 1, 2]


CHOSEN = [[0, 2], [2, 5], [2, 5]]
DRAWN = {
    (0, 0): (0.22471959655079635, True, [40, 40, 18, 40, 40, 40, 12, 40]),
    (0, 5): (0.09340193138533416, True, [40, 40, 40, 40, 40, 40, 40, 40]),
    (3, 2): (0.041041586442893, True, [40, 40, 40, 40, 40, 40, 40, 40]),
}  # (epoch, canvas): level, coin, noised ids; 40 is a clean token


def test_the_stream_of_draws_is_the_one_that_runs_were_made_with():
    """A change here changes the noise of every run that is resumed: say so in the changelog."""
    corruption = make_corruption(canvases_per_example=2)
    example = make_example(11, canvases=6, length=8)
    assert [numbers(corruption.choose(example, epoch)) for epoch in range(3)] == CHOSEN
    for (epoch, canvas), (level, coin, noised) in DRAWN.items():
        draw = corruption.corrupt(example, epoch, example.canvases[canvas])
        assert draw.noise_level == pytest.approx(level, abs=1e-12)
        assert draw.self_condition is coin
        assert draw.noised_L.tolist() == noised
