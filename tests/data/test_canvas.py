"""Canvases cut by hand: prompt 3 tokens, canvas 4, EOS 1."""

import pytest

from ds_dgemma.data.canvas import make_example
from ds_dgemma.errors import UserError

PROMPT = [20, 21, 22]


def cut(response, max_length=100, over_length="drop"):
    return make_example(PROMPT, response, 4, 1, 7, max_length, over_length)


@pytest.mark.parametrize(
    ("response", "canvases"),
    [
        ([30], [30, 1, 1, 1]),
        ([30, 31, 32], [30, 31, 32, 1]),
        ([30, 31, 32, 33], [30, 31, 32, 33, 1, 1, 1, 1]),  # the EOS needs a canvas of its own
        ([30, 31, 32, 1], [30, 31, 32, 1]),  # a template that ends with EOS gets no second one
    ],
)
def test_the_prompt_is_in_no_canvas_and_the_last_one_is_filled_with_eos(response, canvases):
    example = cut(response)
    assert example.tokens_S.tolist() == PROMPT + canvases
    assert [example.prompt_length, example.canvases, example.sample_id] == [3, len(canvases) // 4, 7]


@pytest.mark.parametrize(
    ("max_length", "over_length", "tokens"),
    [
        (11, "drop", 11),
        (10, "drop", None),
        (11, "truncate", 11),
        (10, "truncate", 7),
        (7, "truncate", 7),
        (6, "truncate", None),  # not one canvas fits beside the prompt
        (2, "truncate", None),  # nor the prompt itself
        (11, "error", 11),
    ],
)
def test_max_length_counts_prompt_and_canvases(max_length, over_length, tokens):
    example = cut([30, 31, 32, 33, 34], max_length, over_length)
    assert (example and len(example.tokens_S)) == tokens


def test_a_truncated_response_is_not_taught_to_stop():
    assert cut([30, 31, 32, 33, 34], 10, "truncate").tokens_S.tolist() == [*PROMPT, 30, 31, 32, 33]


def test_the_error_policy_tells_the_lengths():
    with pytest.raises(UserError, match=r"sample 7: prompt 3 \+ response 6 .* = 11 tokens, over .* 10"):
        cut([30, 31, 32, 33, 34], 10, "error")
