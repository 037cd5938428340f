"""What carries words or decides what is learned is read as it stands or refused: ways in which some of it was lost."""

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from ds_dgemma.config.data import ColumnsSection, DataSection
from ds_dgemma.data.control_tokens import checked, control_tokens_of
from ds_dgemma.data.findings import settle
from ds_dgemma.data.formats import BadRow, Layout, read_row
from ds_dgemma.data.reading import Reading
from ds_dgemma.data.sources import Source, open_sources, read_rows
from ds_dgemma.errors import UserError
from tests.data.reading import chat, read, settings, write_rows

COLUMNS = ColumnsSection(prompt="q", response="a")
GOOD = {"q": "Q", "a": "A"}


def open_one(path: Path, **data: Any) -> Source:
    (source,) = open_sources(DataSection(train=str(path), columns=COLUMNS, **data), "train")
    return source


def words(path: Path) -> list[list[str]]:
    """The contents of every row."""
    source, reading = open_one(path), Reading()
    found = [row for chunk in source.chunks() for _, row in read_rows(chunk, source, reading)]
    return [[message["content"] for message in row.messages] for row in found]  # type: ignore[union-attr]


def test_a_table_that_is_replaced_by_one_of_the_same_date_is_read_anew(tmp_path):
    for name in ("t.csv", "t.parquet"):
        path = tmp_path / name
        for answer in ("old", "new"):
            table = datasets.Dataset.from_list([{"q": "Q", "a": answer}])
            table.to_csv(path, index=False) if name == "t.csv" else table.to_parquet(path)
            os.utime(path, (1e9, 1e9))
            assert words(path) == [["Q", answer]]


def test_an_empty_line_moves_no_column_and_long_cells_are_read(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("q,a\n\nQ1,A1,X1\n")
    with pytest.raises(UserError, match="its first row has 3 cells"):
        words(path)
    path.write_text(f"q,a\n\n{'Q' * 200_000},A\n")
    assert words(path) == [["Q" * 200_000, "A"]]


def test_a_table_without_rows_stops_no_folder(tmp_path):
    (tmp_path / "a.csv").write_text("q,a\n")
    datasets.Dataset.from_dict({"q": [], "a": []}).to_parquet(tmp_path / "b.parquet")
    write_rows(tmp_path / "c.jsonl", [GOOD])
    assert words(tmp_path) == [["Q", "A"]]


def test_hidden_folders_are_passed_over_and_several_splits_refused(tmp_path):
    write_rows(tmp_path / "data.jsonl", [GOOD])
    (tmp_path / ".cache").mkdir()
    write_rows(tmp_path / ".cache" / "old.jsonl", [GOOD, GOOD])
    assert len(words(tmp_path)) == 1
    for name in ("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"):
        write_rows(tmp_path / name, [GOOD])
    with pytest.raises(UserError, match="files of several splits"):
        open_one(tmp_path)
    several = tmp_path / "several"
    datasets.DatasetDict({"train": datasets.Dataset.from_list([GOOD])}).save_to_disk(several)
    with pytest.raises(UserError, match="several splits: train"):
        words(several)


@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
def test_a_key_that_stands_twice_with_two_values_is_a_bad_row(tmp_path, name):
    row = '{"q": "Q", "a": "lost", "a": "A"}'
    (tmp_path / name).write_text(f"[{row}]" if name == "t.json" else f"{row}\n")
    source, reading = open_one(tmp_path / name), Reading()
    assert not [row for chunk in source.chunks() for row in read_rows(chunk, source, reading)]
    with pytest.raises(UserError, match="key 'a' stands twice in an object, with two values"):
        settle([(source, reading)], "train")
    assert isinstance(next(source.stream())[1], BadRow)


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({"label": False}, "has label False: the row says that it is not wanted"),
        ({"label": "False"}, "has label 'False'"),
        ({"skip": True}, "has skip True"),
        ({"is_correct": False}, "has is_correct False"),
        ({"assistant_masks": "0"}, "has assistant_masks, which may say what is learned"),
        ({"train_on_inputs": "false"}, "has train_on_inputs, which may say what is learned"),
    ],
)
def test_a_row_that_says_that_it_is_not_wanted_is_refused(more, found):
    for row, layout in ((chat("q", "a"), Layout()), (GOOD, Layout(columns=COLUMNS))):
        with pytest.raises(BadRow, match=found.replace("(", r"\(")):
            read_row({**row, **more}, layout)
    read_row({**GOOD, "label": True, "skip": False, "label_name": "spam", "score": 0.5}, Layout(columns=COLUMNS))


def test_only_the_role_of_a_message_may_be_a_control_token(tokenizer):
    control = control_tokens_of(tokenizer)
    end = control.names[0]

    def brought(arguments: dict[str, Any]) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return {"messages": [{"role": end, "content": "", "tool_calls": [call]}], "tools": None}

    fine = brought({"role": "user"})
    assert checked(fine, control, "error", ()) is fine
    with pytest.raises(BadRow, match=r"tool_calls\[0\]\.function\.arguments\.role holds"):
        checked(brought({"role": end}), control, "error", ())
    hidden = checked(brought({"role": end}), control, "text", ())
    assert hidden["messages"][0]["role"] == end
    assert end not in json.dumps(hidden["messages"][0]["tool_calls"])


def test_what_is_told_of_kept_tokens_names_todays_files(tmp_path, tokenizer):
    for name in ("first.jsonl", "second.jsonl"):
        write_rows(tmp_path / name, [chat("q", "a") | {"note": 1}, {"messages": []}])
        examples = read(settings(tmp_path / name, invalid="drop"), tokenizer, tmp_path / "cache")
        assert all(name in line for line in examples.told)
        assert len(examples.told) == 2
    assert len(list((tmp_path / "cache").glob("*/told.json"))) == 1


def test_a_column_of_images_that_no_row_has_is_told(tmp_path, tokenizer):
    path = write_rows(tmp_path / "t.jsonl", [GOOD])
    columns = {"prompt": "q", "response": "a", "images": "picc"}
    told = read(settings(path, columns=columns), tokenizer, tmp_path / "cache").told
    assert [line.partition(": ")[2] for line in told] == ["no row has picc, which data.columns.images names."]
