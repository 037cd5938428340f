"""A batch holds what was drawn for its examples, whatever else is in it."""

import numpy as np
import pytest
import torch

from ds_dgemma.config import ObjectiveSection
from ds_dgemma.data.batch import Batch, Example
from ds_dgemma.objective.collate import collate
from ds_dgemma.objective.corruption import Corruption

VOCABULARY, LENGTH = 40, 32


def make_corruption(**objective) -> Corruption:
    return Corruption(ObjectiveSection(**objective), seed=7, vocab_size=VOCABULARY, pad_id=0)


def make_example(sample_id: int, canvases: int = 1, prompt: int = 3) -> Example:
    tokens = np.full(prompt + canvases * LENGTH, VOCABULARY, dtype=np.int64)
    return Example(sample_id, tokens, prompt, LENGTH)


def rows_of(batch: Batch) -> dict[int, tuple]:
    """What every sample got, by its id."""
    canvases = (batch.canvas_ids_BKL, batch.target_ids_BKL, batch.canvas_start_BK, batch.self_condition_BK)
    return {
        sample: (
            batch.noise_levels[row],
            *(tensor[row, : len(batch.noise_levels[row])].tolist() for tensor in canvases),
        )
        for row, sample in enumerate(batch.sample_ids)
    }


@pytest.mark.parametrize("canvases_per_example", [1, 2, "all"])
def test_noise_is_the_same_however_the_batch_is_split_and_ordered(canvases_per_example: int | str):
    corruption = make_corruption(canvases_per_example=canvases_per_example)
    examples = [(make_example(sample, canvases=1 + sample % 4), 2) for sample in range(8)]
    whole = rows_of(collate(corruption, examples))
    assert whole == rows_of(collate(corruption, examples[::-1]))
    for size in (1, 2, 4):
        parts = [rows_of(collate(corruption, examples[start : start + size])) for start in range(0, 8, size)]
        assert {sample: row for part in parts for sample, row in part.items()} == whole


def test_a_batch_holds_the_canvases_that_were_chosen_and_nothing_else():
    corruption = make_corruption(canvases_per_example=2)
    tokens = np.arange(1, 4 + 3 * 4, dtype=np.int64)
    examples = [(Example(0, tokens, 3, 4), 0), (Example(1, tokens[:7], 3, 4), 0)]
    batch = collate(corruption, examples)
    assert batch.clean_ids_BS.tolist() == [tokens.tolist(), tokens[:7].tolist() + [0] * 8]
    assert batch.clean_valid_BS.sum(1).tolist() == [15, 7]
    assert batch.supervised_BKL.all(-1).tolist() == [[True, True], [True, False]]
    assert not batch.self_condition_BK[1, 1]
    for row, (example, epoch) in enumerate(examples):
        for k, canvas in enumerate(corruption.choose(example, epoch)):
            start = 3 + 4 * canvas
            assert batch.canvas_start_BK[row, k] == start
            assert batch.noise_levels[row][k] == corruption.corrupt(example, epoch, canvas).noise_level
            assert batch.noise_level_BK[row, k] == np.float32(batch.noise_levels[row][k])
            assert batch.target_ids_BKL[row, k].tolist() == tokens[start : start + 4].tolist()
    assert batch.counts() == (12, 14 + 6)


@pytest.mark.parametrize(
    ("coins", "guessed", "counts"),
    [
        ([[False, True], [True, False]], (1, 2), [True, True]),
        ([[True, False], [False, False]], (0,), [True]),
        ([[False, False], [False, False]], (0,), [False]),  # every rank guesses something, so that ranks stay in step
    ],
)
def test_the_canvases_that_get_a_guess_are_those_whose_coin_is_true_or_else_the_first(
    coins: list[list[bool]], guessed: tuple[int, ...], counts: list[bool]
):
    corruption = make_corruption(canvases_per_example="all")
    drawn = collate(corruption, [(make_example(sample, canvases=2), 0) for sample in range(2)])
    batch = drawn.with_coins(torch.tensor(coins))
    assert (batch.guessed, batch.guessed_M.tolist(), batch.coin_M.tolist()) == (guessed, list(guessed), counts)
    assert batch.self_condition_BK.tolist() == coins


def test_the_coins_of_a_batch_are_those_that_were_drawn():
    corruption = make_corruption(canvases_per_example="all")
    examples = [(make_example(sample, canvases=3), 1) for sample in range(4)]
    batch = collate(corruption, examples)
    drawn = [[corruption.corrupt(example, 1, canvas).self_condition for canvas in range(3)] for example, _ in examples]
    assert batch.self_condition_BK.tolist() == drawn
    assert batch.guessed == tuple(3 * row + canvas for row in range(4) for canvas in range(3) if drawn[row][canvas])


def test_the_batch_is_made_of_the_types_that_it_states():
    batch = collate(make_corruption(), [(make_example(0, canvases=2), 0)])
    assert {batch.clean_ids_BS.dtype, batch.canvas_ids_BKL.dtype, batch.target_ids_BKL.dtype} == {torch.int64}
    assert batch.noise_level_BK.dtype == torch.float32
    assert {batch.clean_valid_BS.dtype, batch.supervised_BKL.dtype, batch.self_condition_BK.dtype} == {torch.bool}
