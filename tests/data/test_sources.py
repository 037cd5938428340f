"""Rows are the same from every kind of file, and each is named by where it stands; a bad one says what is wrong."""

import csv
import gzip
import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from ds_dgemma.config.data import ColumnsSection, DataSection, SourceSection
from ds_dgemma.data.findings import not_read, settle
from ds_dgemma.data.formats import BadRow, Conversation, Layout
from ds_dgemma.data.json_files import BLOCK, CHUNK
from ds_dgemma.data.reading import Reading
from ds_dgemma.data.sources import Source, open_sources, read_rows
from ds_dgemma.data.tables import hub_dataset
from ds_dgemma.errors import UserError

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
GOOD = json.dumps({"messages": TURNS}).encode()


def open_one(path: Path | str, **data: Any) -> Source:
    (source,) = open_sources(DataSection(train=str(path), **data), "train")
    return source


def write(folder: Path, *lines: bytes, name: str = "chats.jsonl") -> Path:
    path = folder / name
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def rows(source: Source) -> list[tuple[int, Any]]:
    """As worker processes see them."""
    return [pair for chunk in source.chunks() for pair in pickle.loads(pickle.dumps(chunk)).rows()]


def read(source: Source) -> tuple[list[Any], Reading]:
    """Every good row, and what was seen."""
    found, reading = [], Reading()
    for chunk in source.chunks():
        own = Reading()
        found += [row for _, row in read_rows(chunk, source, own)]
        reading.add(own)
    return found, reading


def told(path: Path, **data: Any) -> list[str]:
    source = open_one(path, **data)
    return settle([(source, read(source)[1])], "train", data.get("invalid", "error"))


PAIRS = [{"prompt": f'{n:03}, "q"\n', "completion": "NA" if n % 2 else "null"} for n in range(CHUNK + 2)]


def write_pairs(folder: Path, name: str) -> Path:
    path, plain = folder / name, folder / name.removesuffix(".gz")
    if ".json" in name:
        text = json.dumps(PAIRS, indent=1) if plain.suffix == ".json" else "\n".join(map(json.dumps, PAIRS))
        plain.write_text(text)
    elif plain.suffix == ".parquet":
        datasets.Dataset.from_list(PAIRS).to_parquet(plain)
    else:
        with plain.open("w", newline="") as file:
            table = csv.DictWriter(file, PAIRS[0], delimiter="," if plain.suffix == ".csv" else "\t")
            table.writeheader()
            table.writerows(PAIRS)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(plain.read_bytes()))
    return path


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind, packed):
    source = open_one(write_pairs(tmp_path, f"pairs.{kind}{packed}"))
    assert rows(source) == list(enumerate(PAIRS))
    assert [len(source), source.row(CHUNK + 1)] == [len(PAIRS), PAIRS[-1]]


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.json", "p.csv", "p.csv.gz", "p.parquet", "p.parquet.gz"])
def test_a_stream_begins_at_any_row(tmp_path, name):
    source = open_one(write_pairs(tmp_path, name), streaming=True)
    for start in (0, 1, CHUNK, len(PAIRS)):
        assert list(source.stream(start)) == list(enumerate(PAIRS))[start:]


def test_a_folder_a_glob_and_a_list_are_read_in_the_order_of_names(tmp_path):
    (tmp_path / "b").mkdir()
    write(tmp_path, b'{"text": "1"}', b"", b'{"text": "2"}', name="a.jsonl")
    write(tmp_path / "b", b"text", b"3", name="t.csv")
    write(tmp_path, b'[{"text": "4"}, {"text": "5"}]', name="c.json")
    write(tmp_path, b"words", name="notes.md")
    expected = [(n, {"text": str(n + 1)}) for n in range(5)]
    folder = open_one(tmp_path)
    assert rows(folder) == expected
    assert [folder.where(row) for row in (1, 2, 4)] == [
        f"{tmp_path}/a.jsonl:3",
        f"{tmp_path}/b/t.csv row 0",
        f"{tmp_path}/c.json row 1",
    ]
    assert folder.row(4) == {"text": "5"}
    assert not_read(folder, Reading()) == f"{tmp_path}: not read: {tmp_path}/notes.md"
    assert rows(open_one(f"{tmp_path}/*.json*")) == [(n, {"text": text}) for n, text in enumerate("1245")]
    streamed = open_one(tmp_path, streaming=True)
    assert [list(streamed.stream(start)) for start in range(6)] == [expected[start:] for start in range(6)]
    first, second = open_sources(
        DataSection(
            train=(f"{tmp_path}/a.jsonl", SourceSection(path=f"{tmp_path}/c.json", weight=2, learn="all")), learn="last"
        ),
        "train",
    )
    assert [(s.weight, s.learn, len(s)) for s in (first, second)] == [(1, "last", 2), (2, "all", 2)]


def test_an_entry_says_itself_how_its_rows_are_read(tmp_path):
    write(tmp_path, b'{"q": "q", "a": "a", "system": "s"}', name="q.jsonl")
    write(tmp_path, GOOD, name="m.jsonl")
    own = SourceSection(
        path=f"{tmp_path}/q.jsonl", columns=ColumnsSection(prompt="q", response="a"), ignore=("system",)
    )
    sources = open_sources(DataSection(train=(own, f"{tmp_path}/m.jsonl")), "train")
    assert [read(source)[0] for source in sources] == [[Conversation(TURNS, [None, None])]] * 2
    assert sources[0].digest != open_one(f"{tmp_path}/q.jsonl").digest


def test_the_home_folder_is_expanded_and_stays_spelled_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, GOOD)
    assert open_one("~/chats.jsonl").where(0) == "~/chats.jsonl:1"
    assert open_one("~/*.jsonl").where(0) == "~/chats.jsonl:1"


def test_a_saved_dataset_is_read(tmp_path):
    datasets.Dataset.from_list(PAIRS).save_to_disk(tmp_path / "saved")
    assert rows(open_one(tmp_path / "saved")) == list(enumerate(PAIRS))


def test_arrow_gives_no_keys_that_a_row_did_not_have(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    calls = [*TURNS[:1], {"role": "assistant", "content": "a", "tool_calls": [call]}]
    datasets.Dataset.from_list([{"messages": TURNS}, {"messages": calls}]).to_parquet(tmp_path / "m.parquet")
    assert rows(open_one(tmp_path / "m.parquet")) == [(0, {"messages": TURNS}), (1, {"messages": calls})]


def test_a_split_of_a_hub_dataset_is_read_whole_or_streamed(tmp_path):
    write(tmp_path, b'{"text": "1"}', name="train.jsonl")
    write(tmp_path, *[b'{"text": "%d"}' % n for n in range(CHUNK + 2)], name="test.jsonl")
    table = hub_dataset(str(tmp_path), None, None, "test", "validation", frozenset())  # `datasets` opens it as a hub's
    source = Source("some/set", (table,), Layout(), "last", 1.0)
    assert rows(source) == [(n, {"text": str(n)}) for n in range(CHUNK + 2)]
    assert source.where(3) == f"{tmp_path} [test] row 3"
    streamed = pickle.loads(pickle.dumps(Source("some/set", (table,), Layout(), "last", 1.0, streaming=True)))
    assert list(streamed.stream(CHUNK)) == [(n, {"text": str(n)}) for n in (CHUNK, CHUNK + 1)]
    with pytest.raises(UserError, match="no local file"):
        hub_dataset(str(tmp_path), None, None, "dev", "validation", frozenset()).count()


def test_columns_of_audio_are_refused_before_they_are_decoded(tmp_path):
    table = datasets.Dataset.from_dict({"prompt": ["q"], "completion": ["a"], "audio": [None]})
    table.cast_column("audio", datasets.Audio()).to_parquet(tmp_path / "m.parquet")
    with pytest.raises(UserError, match=r"m\.parquet has a column audio\. Video and audio are not trained on"):
        open_one(tmp_path / "m.parquet")
    assert rows(open_one(tmp_path / "m.parquet", ignore=("audio",))) == [(0, {"prompt": "q", "completion": "a"})]


def test_a_million_bytes_and_blank_lines_move_no_row(tmp_path):
    lines: Sequence[bytes] = [b" \t"] + [b'{"text": "%d"}' % n + b"\n" * (n % 3) for n in range(3 * CHUNK)]
    long = b'{"text": "' + b"x" * (BLOCK + 1) + b'"}'
    source = open_one(write(tmp_path, *lines, long, b"\r", b'{"text": "end"}\r'))
    assert [row for row, _ in rows(source)] == list(range(3 * CHUNK + 2))
    assert [source.row(row) for row in (0, 777, 3 * CHUNK + 1)] == [{"text": "0"}, {"text": "777"}, {"text": "end"}]
    number = (tmp_path / "chats.jsonl").read_bytes().split(b"\n").index(b'{"text": "777"}') + 1
    assert source.where(777) == f"{tmp_path}/chats.jsonl:{number}"


def test_line_separators_inside_a_string_are_text(tmp_path):
    text = "one\u2028two\u2029three\u0085four\r\n"
    source = open_one(
        write(tmp_path, b"\xef\xbb\xbf" + GOOD + b"\r", json.dumps({"text": text}, ensure_ascii=False).encode())
    )
    assert rows(source) == [(0, {"messages": TURNS}), (1, {"text": text})]


def test_a_file_is_opened_once_for_a_chunk(tmp_path, monkeypatch):
    source = open_one(write(tmp_path, *[GOOD] * (2 * CHUNK)))
    opens, original = [], Path.open
    monkeypatch.setattr(Path, "open", lambda *args, **kwargs: opens.append(args) or original(*args, **kwargs))
    assert len(rows(source)) == 2 * CHUNK
    assert len(opens) == 2


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'{"messages": [', "broken JSON"),
        (b'{"messages": ' + b"[" * 100_000, "broken JSON"),
        (b'["a"]', "jq -c"),
        (b"3", "a number, expected an object"),
        (GOOD.replace(b'"a"', b'"\xff"'), "not UTF-8"),
        (GOOD.replace(b'"a"', b'"\0"'), "NUL byte"),
        (b'{"messages": []}', "messages is empty"),
    ],
)
def test_a_broken_row_is_named_with_its_line(tmp_path, line, found):
    with pytest.raises(UserError) as error:
        told(write(tmp_path, GOOD, b"", line, GOOD))
    assert str(error.value).startswith(
        f"1 bad row of 3 in data.train = {tmp_path}/chats.jsonl\n  {tmp_path}/chats.jsonl:3: "
    )
    assert found in str(error.value)


def test_many_broken_rows_are_counted_and_the_first_ten_shown(tmp_path):
    with pytest.raises(UserError) as error:
        told(write(tmp_path, GOOD, *[b"{"] * (CHUNK + 25)))
    lines = str(error.value).splitlines()
    assert lines[0] == f"{CHUNK + 25} bad rows of {CHUNK + 26} in data.train = {tmp_path}/chats.jsonl (the first 10)"
    assert [":2: " in lines[1], ":11: " in lines[-1], len(lines)] == [True, True, 11]


def test_bad_rows_that_are_dropped_are_listed(tmp_path):
    (line,) = told(write(tmp_path, GOOD, b"3"), invalid="drop")
    assert line == (
        f"dropped: 1 bad row of 2 in data.train = {tmp_path}/chats.jsonl\n"
        f"  {tmp_path}/chats.jsonl:2: a number, expected an object with messages."
    )
    with pytest.raises(UserError, match="1 bad row of 1"):
        told(write(tmp_path, b"3"), invalid="drop")


def test_what_is_not_read_and_what_stands_twice_is_told(tmp_path):
    path = write(
        tmp_path,
        GOOD[:-1] + b', "id": "a", "source": "s", "category": "c"}',
        GOOD[:-1] + b', "id": 1, "source": "s", "messages": ' + json.dumps(TURNS).encode() + b"}",
        GOOD[:-1] + b', "id": null}',
        GOOD[:-1] + b', "id": null}',
        *[GOOD] * CHUNK,
        GOOD[:-1] + b', "id": "a", "source": ""}',
    )
    assert told(path) == [
        f"{path}:2: key 'messages' stands twice in an object; the last counts",
        f"{path}:{CHUNK + 5}: its id is that of {path}:1 too",
        f"{path}: not read: source (2 rows), category (1 row)",
    ]


def test_names_that_no_row_has_and_another_models_marks_are_told(tmp_path):
    thought = [{"role": "user", "content": "<image> a?"}, {"role": "assistant", "content": "<think>so</think>a"}]
    path = write(tmp_path, json.dumps({"messages": thought, "distractor": "x", "note": "y"}).encode())
    assert told(path, ignore=["note", "distracter"]) == [
        f"{path}: not read: distractor (1 row)",
        f"{path}: no row has distracter, which data.ignore names. Did you mean distractor?",
        f"{path}: <image> stands in 1 text and is learned as plain text: the images of a row are in its column image "
        "or images, or in parts of its messages",
        f"{path}: <think> stands in 1 answer and is learned as plain text: thoughts go into reasoning_content, "
        "calls into tool_calls",
    ]
    table = tmp_path / "pairs.csv"
    table.write_text("prompt,completion,note\nq,a,n\n")
    assert told(table, ignore=["note", "other"]) == [f"{table}: no row has other, which data.ignore names."]


def test_equal_content_has_an_equal_digest_and_a_stream_goes_by_size_and_date(tmp_path):
    first, second = write(tmp_path, GOOD), write(tmp_path, GOOD, name="other.jsonl")
    assert open_one(first).digest == open_one(second).digest
    before = open_one(first, streaming=True).digest
    assert open_one(first, streaming=True).digest == before
    os.utime(first, ns=(1, 1))
    assert open_one(first, streaming=True).digest != before


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("chats.jsonl", None, "data.train: no file "),
        ("chats.jsonl", b"", "is empty"),
        ("chats.jsonl", b"\n \n", "is empty"),
        ("chats.json", b"[]", "is empty"),
        ("chats.json", b'[{"text": "a"}, {"text"', "broken JSON: Expecting ':' delimiter: line 1 column 24"),
        ("chats.json", b'[{"text": "a"}] 3', "broken JSON: Extra data"),
        ("chats.jsonl.gz", b"words", "cannot read"),
        ("chats.jsonl.gz", gzip.compress(GOOD, mtime=0)[:-9], "cannot read"),
        ("chats.parquet", b"words", "as parquet: "),
        ("chats.csv", b"a,a\n1,2\n", "its first line is no list of different column names: 'a,a'"),
        (
            "chats.csv",
            b"a,b\n1,2\n4,5,6\n",
            "as csv: Error tokenizing data. C error: Expected 2 fields in line 3, saw 3",
        ),
        ("chats.csv", b"a,b\n1,2,3\n", "its first row has 3 cells, but there are 2 column names"),
        ("chats.txt", b"words", "ends in none of .jsonl, .ndjson, .json, .csv, .tsv, .parquet (also with .gz): rename"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name, content, found):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        open_one(tmp_path / name)
    assert found in str(error.value)


def test_wrong_names_and_settings_are_refused_with_what_to_do(tmp_path):
    path = write(tmp_path, GOOD)
    with pytest.raises(UserError, match=r"Did you mean chats\.jsonl"):
        open_one(tmp_path / "chat.jsonl")
    with pytest.raises(UserError, match=r"matches no file that ends in \.jsonl"):
        open_one(f"{tmp_path}/*.csv")
    with pytest.raises(UserError, match="has split test, which only a hub dataset has"):
        open_sources(DataSection(train=(SourceSection(path=str(path), split="test"),)), "train")
    with pytest.raises(UserError, match="has columns and format text"):
        open_one(path, format="text", columns=ColumnsSection(prompt="a", response="b"))
    with pytest.raises(
        UserError, match=r"no local file no/such, and the hub dataset of that id \(configuration main, "
    ):
        open_one("no/such", hub_config="main")


def test_problems_found_by_rendering_join_the_same_list(tmp_path):
    source = open_one(write(tmp_path, GOOD, b"3"))
    _, reading = read(source)
    reading.bad(0, BadRow("the template leaves out a part."))
    with pytest.raises(UserError, match=r"2 bad rows of 2(?s:.)*chats\.jsonl:1: the template leaves out a part"):
        settle([(source, reading)], "train")
