"""A batch holds what was drawn for its examples, whatever else is in it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ds_dgemma.config.run import ObjectiveSection
from ds_dgemma.data.batch import Batch, Example, Span
from ds_dgemma.data.canvas import Cut
from ds_dgemma.objective.collate import collate
from ds_dgemma.objective.corruption import Corruption
from tests.reference.examples import one_answer

VOCABULARY, LENGTH, EOS = 40, 32, 1
CUT = Cut(max_length=500, over_length="drop", canvas_length=LENGTH, eos_id=EOS)


def make_corruption(**objective) -> Corruption:
    return Corruption(ObjectiveSection(**objective), seed=7, vocab_size=VOCABULARY)


def make_example(sample_id: int, canvases: int = 1, prompt: int = 3) -> Example:
    tokens = np.full(prompt + canvases * LENGTH, VOCABULARY)
    tokens[-1] = EOS
    return one_answer(sample_id, tokens, prompt, LENGTH, EOS)


def documents_of(batch: Batch) -> dict[int, list[tuple]]:
    """What every sample got, by its id."""
    canvases = (batch.canvas_ids_CL, batch.target_ids_CL, batch.canvas_start_C, batch.self_condition_C)
    drawn = list(zip(batch.noise_levels, *(tensor.tolist() for tensor in canvases), strict=True))
    return {
        sample: [canvas for canvas, (of, _) in zip(drawn, batch.canvases, strict=True) if of == document]
        for document, sample in enumerate(batch.sample_ids)
    }


@pytest.mark.parametrize("canvases_per_example", [1, 2, "all"])
def test_noise_is_the_same_however_the_batch_is_split_and_ordered(canvases_per_example: int | str):
    corruption = make_corruption(canvases_per_example=canvases_per_example)
    examples = [(make_example(sample, canvases=1 + sample % 4), 2) for sample in range(8)]
    whole = documents_of(collate(corruption, examples))
    assert whole == documents_of(collate(corruption, examples[::-1]))
    for size in (1, 2, 4):
        parts = [documents_of(collate(corruption, examples[start : start + size])) for start in range(0, 8, size)]
        assert {sample: row for part in parts for sample, row in part.items()} == whole


def test_a_batch_holds_the_canvases_that_were_chosen_and_nothing_else():
    """Of a long answer, and of a conversation with an answer of weight 0.5, one that is not learned, and a last one."""
    corruption = make_corruption(canvases_per_example=2)
    cut = replace(CUT, canvas_length=4)
    long = cut.example(0, np.arange(10, 24), [Span(3, 14, 1.0, 0)])
    spans = [Span(2, 8, 0.5, 0), Span(10, 12, 0.0, 1), Span(14, 17, 1.0, 2)]
    turns = cut.example(1, np.arange(30, 47), spans)
    assert [tuple(place) for place in turns.canvases] == [(2, 0, 0), (6, 0, 1), (14, 2, 0)]
    assert turns.tokens_S.tolist() == [*range(30, 47), EOS]
    assert [turns.target_L(place).tolist() for place in turns.canvases] == [
        [32, 33, 34, 35], [36, 37, EOS, EOS], [44, 45, 46, EOS]]  # fmt: skip
    batch = collate(corruption, [(long, 0), (turns, 0)])
    assert batch.documents == (15, 18)
    assert batch.clean_ids_S.tolist() == [*range(10, 24), EOS, *range(30, 47), EOS]
    assert batch.position_S.tolist() == [*range(15), *range(18)]
    assert batch.ar_place_A.tolist() == [place for place in range(1, 33) if place not in (15, 25, 26)]
    assert batch.ar_weight_A.tolist() == [1.0] * 15 + [0.5] * 6 + [1.0] * 8
    canvas_tokens, ar_tokens = batch.counts()
    assert (canvas_tokens, ar_tokens) == (4 * batch.canvas_weight_CL[:, 0].sum(), 26)
    assert batch.counting([False, True]).counts() == (4 * batch.canvas_weight_CL[2:, 0].sum(), 12)
    for number, (example, places) in enumerate((e, corruption.choose(e, 0)) for e in (long, turns)):
        assert len(places) == 2
        mine = [i for i, (document, _) in enumerate(batch.canvases) if document == number]
        for i, place in zip(mine, places, strict=True):
            canvas = corruption.corrupt(example, 0, place)
            assert batch.canvases[i] == (number, place.start)
            assert batch.canvas_start_C[i] == place.start
            assert batch.noise_levels[i] == canvas.noise_level
            assert batch.noise_level_C[i] == np.float32(canvas.noise_level)
            assert batch.target_ids_CL[i].tolist() == example.target_L(place).tolist()
            assert batch.canvas_weight_CL[i].tolist() == [example.spans[place.span].weight] * 4


def test_the_encoders_loss_covers_all_tokens_or_the_answers_each_by_its_weight():
    spans = [Span(2, 4, 0.5, 0), Span(5, 6, 0.0, 1), Span(7, 9, 1.0, 2)]
    cut = replace(CUT, canvas_length=4)
    example = lambda **more: cut.example(1, np.arange(30, 39), spans, **more).ar_weight_S.tolist()  # noqa: E731
    assert example() == [0, 1, 0.5, 0.5, 1, 0, 1, 1, 1, 1, 1]
    assert example(scored_from=5) == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]  # another document of the row has the others
    cut = replace(cut, ar_tokens="learned")
    assert example() == [0, 0, 0.5, 0.5, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("coins", "guessed", "counts"),
    [
        ([False, True, True, False], (1, 2), [True, True]),
        ([True, False, False, False], (0,), [True]),
        ([False, False, False, False], (0,), [False]),  # every rank guesses something, so that ranks stay in step
    ],
)
def test_the_canvases_that_get_a_guess_are_those_whose_coin_is_true_or_else_the_first(
    coins: list[bool], guessed: tuple[int, ...], counts: list[bool]
):
    corruption = make_corruption(canvases_per_example="all")
    drawn = collate(corruption, [(make_example(sample, canvases=2), 0) for sample in range(2)])
    batch = drawn.with_coins(torch.tensor(coins))
    assert (batch.guessed, batch.guessed_M.tolist(), batch.coin_M.tolist()) == (guessed, list(guessed), counts)
    assert batch.self_condition_C.tolist() == coins


def test_the_coins_of_a_batch_are_those_that_were_drawn():
    corruption = make_corruption(canvases_per_example="all")
    examples = [(make_example(sample, canvases=3), 1) for sample in range(4)]
    batch = collate(corruption, examples)
    drawn = [corruption.corrupt(e, 1, place).self_condition for e, _ in examples for place in e.canvases]
    assert batch.self_condition_C.tolist() == drawn
    assert batch.guessed == tuple(number for number in range(12) if drawn[number])


def test_the_batch_is_made_of_the_types_that_it_states():
    batch = collate(make_corruption(), [(make_example(0, canvases=2), 0)])
    ids = (batch.clean_ids_S, batch.position_S, batch.ar_place_A, batch.canvas_ids_CL, batch.target_ids_CL)
    assert {tensor.dtype for tensor in (*ids, batch.canvas_start_C, batch.guessed_M)} == {torch.int64}
    assert {batch.noise_level_C.dtype, batch.ar_weight_A.dtype, batch.canvas_weight_CL.dtype} == {torch.float32}
    assert {batch.coin_M.dtype, batch.self_condition_C.dtype} == {torch.bool}
