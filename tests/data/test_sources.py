"""Every broken row is named with its line; what is right is read as it stands."""

import json
from pathlib import Path

import datasets
import pytest

from ds_dgemma.config import ColumnsSection, DataSection
from ds_dgemma.data.sources import conversations_of_dataset, load_conversations
from ds_dgemma.errors import UserError

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
GOOD = json.dumps({"messages": TURNS}).encode()


def load(path: Path, **data):
    return load_conversations(DataSection(train=str(path), **data), "train")


def write(folder: Path, *lines: bytes) -> Path:
    path = folder / "chats.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def chat(*turns: tuple[str, object]) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}).encode()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'{"messages": [', "broken JSON"),
        (b'{"messages": ' + b"[" * 100_000, "broken JSON"),
        (b'["a"]', "jq -c"),
        (b"3", "a number, expected an object"),
        (b'{"mesages": []}', "the columns are: mesages. Other columns are mapped"),
        (b'{"messages": {}}', "expected a list"),
        (b'{"messages": []}', "messages is empty"),
        (b'{"messages": ["hello"]}', "messages[0] is a string"),
        (b'{"messages": [{"role": "user"}]}', "messages[0] has no content"),
        (chat(("user", "q"), ("model", "a")), "Use assistant"),
        (chat(("user", "q"), ("tool", "a")), "role 'tool', expected one of system, user, assistant"),
        (chat(("user", "q"), ("assistant", 3)), "messages[1].content is a number"),
        (chat(("user", "q"), ("assistant", " ")), "messages[1].content is empty"),
        (chat(("user", [{"type": "tool"}]), ("assistant", "a")), "a part of type tool, only text was expected"),
        (
            chat(("user", [{"type": "text", "text": "q"}, {"type": "image", "url": "a.png"}]), ("assistant", "a")),
            "messages[0].content has a part of type image. Images, video and audio are not trained on yet: leave this",
        ),
        (chat(("user", [{"type": "image_url", "image_url": {}}]), ("assistant", "a")), "a part of type image_url. Ima"),
        (GOOD[:-1] + b', "images": ["a.png"]}', "has images. Images, video and audio are not trained on yet"),
        (chat(("user", "q")), "no assistant turn"),
        (chat(("user", "q"), ("assistant", "a"), ("user", "q")), "the last message is from user"),
        (chat(("system", "s"), ("assistant", "a")), "no user turn before it"),
        (chat(("user", "\ud800"), ("assistant", "a")), "half a surrogate pair"),
        (GOOD.replace(b'"a"', b'"\xff"'), "not UTF-8"),
        (GOOD.replace(b'"a"', b'"\0"'), "NUL byte"),
        (GOOD.replace(b'"a"', b'"a", "tool_calls": [1]'), "tool_calls, which is not supported"),
    ],
)
def test_a_broken_row_is_named_with_its_line(tmp_path, line, found):
    with pytest.raises(UserError) as error:
        load(write(tmp_path, GOOD, b"", line, GOOD))
    assert "1 bad row of 3" in str(error.value)
    assert "chats.jsonl:3: " in str(error.value)
    assert found in str(error.value)


def test_two_rows_of_one_id_are_named(tmp_path):
    rows = [GOOD[:-1] + b', "id": %s}' % name for name in (b'"a"', b"1", b"null", b"null", b'"a"')]
    with pytest.raises(UserError, match=r"chats\.jsonl:5: id 'a' is that of \S*chats\.jsonl:1 too"):
        load(write(tmp_path, *rows))


def test_many_broken_rows_are_counted_and_the_first_ten_shown(tmp_path):
    with pytest.raises(UserError) as error:
        load(write(tmp_path, GOOD, *[b"{"] * 25))
    lines = str(error.value).splitlines()
    assert "25 bad rows of 26" in lines[0]
    assert [":2: " in lines[1], ":11: " in lines[-1], len(lines)] == [True, True, 11]


@pytest.mark.parametrize("content", [None, b"", b"\n \n"])
def test_a_missing_or_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "chats.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="no file" if content is None else "is empty"):
        load(path)


def test_a_misspelled_file_gets_a_suggestion(tmp_path):
    write(tmp_path, GOOD)
    with pytest.raises(UserError, match=r"Did you mean chats\.jsonl"):
        load(tmp_path / "chat.jsonl")


def test_line_separators_inside_a_string_are_text(tmp_path):
    text = "one\u2028two\u2029three\u0085four\r\n"
    line = json.dumps({"messages": [TURNS[0], {"role": "assistant", "content": text}]}, ensure_ascii=False)
    conversations = load(write(tmp_path, b"\xef\xbb\xbf" + GOOD + b"\r", line.encode()))
    assert [conversations[row][1]["content"] for row in range(2)] == ["a", text]


def test_text_parts_are_joined(tmp_path):
    parts = [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]
    conversations = load(write(tmp_path, chat(("user", "q"), ("assistant", parts))))
    assert conversations[0] == [TURNS[0], {"role": "assistant", "content": "42"}]


def test_two_columns_are_a_conversation_and_a_missing_one_names_those_there(tmp_path):
    path = write(tmp_path, b'{"question": "q", "answer": "a"}')
    columns = ColumnsSection(prompt="question", response="answer")
    assert load(path, columns=columns)[0] == TURNS
    with pytest.raises(UserError, match=r"no column anser; the columns are: question, answer\. Did you mean answer"):
        load(path, columns=ColumnsSection(prompt="question", response="anser"))


def test_a_dataset_reads_as_the_same_file_does(tmp_path):
    rows = [{"question": "q", "answer": "a", "other": 1}]
    columns = ColumnsSection(prompt="question", response="answer")
    conversations = conversations_of_dataset(datasets.Dataset.from_list(rows), "some/set", columns)
    assert [conversations[0], len(conversations)] == [TURNS, 1]
    with pytest.raises(UserError, match="no column messages; the columns are: question, answer, other"):
        conversations_of_dataset(datasets.Dataset.from_list(rows), "some/set", None)


def test_a_dataset_of_questions_about_images_is_refused_and_not_trained_on_blindly(tmp_path):
    rows = datasets.Dataset.from_list([{"question": "q", "answer": "a", "image": "a.png"}])
    with pytest.raises(
        UserError, match=r"some/set has a column image\. Images, video and audio are not trained on yet"
    ):
        conversations_of_dataset(rows, "some/set", ColumnsSection(prompt="question", response="answer"))


def test_empty_image_columns_do_no_harm(tmp_path):
    conversations = load(write(tmp_path, GOOD[:-1] + b', "images": [], "image": null}'))
    assert conversations[0] == TURNS
