"""Rows cut into examples by hand: canvases of 8 characters, `<bos><|turn>user\\n` before a prompt."""

import copy
import errno
import fcntl
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ds_dgemma.data.batch import Example
from ds_dgemma.errors import UserError
from tests.data.reading import chat, chats, read, settings, write_rows

EOS = "<eos>"


def shown(example: Example, tokenizer) -> list[str]:
    """The targets of its canvases, as text."""
    return [tokenizer.decode(example.target_L(place)) for place in example.canvases]


@pytest.fixture
def cut(tmp_path, tokenizer):
    def cut(rows, **data):
        examples = read(settings(write_rows(tmp_path / "rows.jsonl", rows), **data), tokenizer, tmp_path / "cache")
        return [examples[place] for place in range(len(examples))]

    return cut


@pytest.mark.parametrize(
    ("answer", "canvases"),
    [
        ("abc", ["abc<turn|>" + 4 * EOS]),
        ("abcdef", ["abcdef<turn|>" + EOS]),
        ("abcdefg", ["abcdefg<turn|>", 8 * EOS]),  # the EOS needs a canvas of its own
    ],
)
def test_the_last_canvas_is_filled_with_eos_which_stands_in_the_clean_sequence_too(cut, tokenizer, answer, canvases):
    (example,) = cut([chat("hi", answer)])
    assert shown(example, tokenizer) == canvases
    assert tokenizer.decode(example.tokens_S) == "<bos><|turn>user\nhi<turn|>\n<|turn>model\n" + "".join(canvases)


def test_every_answer_is_cut_from_its_own_first_token_and_filled_in_its_canvas_only(cut, tokenizer):
    (example,) = cut([chat("hi", "abcdefghi", "so?", "yes")], learn="all")
    assert shown(example, tokenizer) == ["abcdefgh", "i<turn|>" + 6 * EOS, "yes<turn|>" + 4 * EOS]
    assert [place.span for place in example.canvases] == [0, 0, 1]
    assert tokenizer.decode(example.tokens_S) == (
        "<bos><|turn>user\nhi<turn|>\n<|turn>model\nabcdefghi<turn|>\n"
        "<|turn>user\nso?<turn|>\n<|turn>model\nyes<turn|>" + 4 * EOS
    )
    assert example.ar_weight_S.tolist() == [0.0] + [1.0] * (len(example.tokens_S) - 1)


def test_an_answer_that_is_not_to_be_learned_is_in_neither_loss(cut, tokenizer):
    row = chat("hi", "no", "so?", "yes")
    row["messages"][1]["weight"] = 0
    (example,) = cut([row], learn="all")
    assert shown(example, tokenizer) == ["yes<turn|>" + 4 * EOS]
    text = tokenizer.decode(example.tokens_S)
    start = len(tokenizer(text[: text.index("no")], add_special_tokens=False)["input_ids"])
    assert np.flatnonzero(example.ar_weight_S == 0).tolist() == [0, start, start + 1, start + 2]  # n, o, <turn|>


@pytest.mark.parametrize(
    ("max_length", "over_length", "tokens"),
    [
        (41, "drop", 41),
        (40, "drop", None),
        (41, "truncate", 41),
        (40, "truncate", 33),
        (32, "truncate", None),  # not one canvas fits beside the prompt
        (25, "truncate", None),  # nor the prompt itself
        (41, "error", 41),
    ],
)
def test_max_length_counts_prompt_and_canvases(cut, tokenizer, max_length, over_length, tokens):
    """25 tokens of prompt and an answer of 10 in 2 canvases; and an example of 25 tokens in all."""
    rows = [chat("how long?", "123456789"), chat("a", "b")]
    found = cut(rows, max_length=max_length, over_length=over_length)
    assert [len(example.tokens_S) for example in found] == ([] if tokens is None else [tokens]) + [25]
    if tokens == 33:
        assert shown(found[0], tokenizer) == ["12345678"]  # and is not taught to stop


def test_a_conversation_that_is_too_long_ends_with_the_last_answer_that_has_room(cut, tokenizer):
    row = chat("hi", "abc", "and then?", "x" * 30)
    (example,) = cut([row], learn="all", max_length=40, over_length="truncate")
    assert shown(example, tokenizer) == ["abc<turn|>" + 4 * EOS]
    assert len(example.tokens_S) == 18 + 8
    (example,) = cut([row], learn="all", max_length=64, over_length="truncate")
    assert shown(example, tokenizer)[1:] == ["x" * 8, "x" * 8]


def test_what_the_length_policy_did_is_counted_and_too_long_rows_are_named(tmp_path, tokenizer):
    path = write_rows(tmp_path / "chats.jsonl", chats(10))

    def report(**data):
        return read(settings(path, **data), tokenizer, tmp_path / "cache").sources[0].report

    assert str(report(max_length=41)) == "kept 6 of 10 examples, dropped 4, truncated 0 (max_length 41)"
    assert str(report(max_length=41, over_length="truncate")) == (
        "kept 10 of 10 examples, dropped 0, truncated 4 (max_length 41)"
    )
    several = write_rows(tmp_path / "several.jsonl", [chat("hi", "abc", "and", "d", "and then?", "x" * 30)])
    cut_off = read(settings(several, max_length=40, learn="all", over_length="truncate"), tokenizer, tmp_path / "cache")
    assert "truncated 1, 2 more answers left out behind the cut (" in str(cut_off.sources[0].report)
    with pytest.raises(UserError, match=r"4 examples (?s:.*)chats\.jsonl:7: prompt 26 \+ response 9 .* 42 tokens"):
        report(max_length=41, over_length="error")
    with pytest.raises(UserError, match=r"no example fits data\.max_length 9; the shortest takes 34 tokens"):
        report(max_length=9)


def test_running_text_is_learned_whole_from_any_token_on_and_cut_into_several_examples(cut, tokenizer):
    text = "".join(chr(97 + i % 26) for i in range(40))
    first, second, third = cut([{"text": text}], max_length=17 + 2)
    assert [tokenizer.decode(example.tokens_S) for example in (first, second, third)] == [
        "<bos>" + text[:16],
        "<bos>" + text[16:32],
        "<bos>" + text[32:] + 8 * EOS,
    ]
    assert shown(first, tokenizer) == [text[:8], text[8:16]]  # it goes on, so it does not stop
    assert [place.start for place in first.canvases_from(3)] == [4]
    assert [tokenizer.decode(third.target_L(place)) for place in third.canvases_from(0)] == [text[32:], 8 * EOS]
    assert len({(example.sample_id, example.spans[0].number) for example in (first, second, third)}) == 3


def test_tokens_are_kept_until_data_or_template_change(tmp_path, tokenizer):
    path, cache = write_rows(tmp_path / "chats.jsonl", chats(3)), tmp_path / "cache"

    def folders():
        return {found for found in cache.iterdir() if found.is_dir()}

    read(settings(path), tokenizer, cache)
    first = folders()
    read(settings(path, max_length=64), tokenizer, cache)
    assert folders() == first
    write_rows(path, chats(4))
    read(settings(path), tokenizer, cache)
    second = folders()
    tokenizer.chat_template += " "
    assert len(read(settings(path), tokenizer, cache)) == 4
    assert len(folders()) == 3
    (last,) = folders() - second
    for kept in last.iterdir():
        kept.unlink()  # as a cleaner of old files, or an older version, leaves it
        read(settings(path), tokenizer, cache)
        assert kept.exists(), kept


@pytest.mark.parametrize("locks", [True, False])
def test_ranks_that_tokenize_at_once_agree_and_leave_no_debris(tmp_path, tokenizer, monkeypatch, locks):
    config, cache = settings(write_rows(tmp_path / "chats.jsonl", chats(10))), tmp_path / "cache"
    together = threading.Barrier(4, timeout=60)

    def no_locks(file, operation):
        together.wait()
        raise OSError(errno.ENOLCK, "no locks here")

    if not locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    with ThreadPoolExecutor(4) as pool:
        sets = list(pool.map(lambda own: read(config, own, cache), [copy.deepcopy(tokenizer) for _ in range(4)]))
    assert len({examples[9].tokens_S.tobytes() for examples in sets}) == 1
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1
