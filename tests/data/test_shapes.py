"""Pictures of shapes: what is asked for, the same every time, and nothing of the test in the training data."""

import json
from pathlib import Path

import pytest
from PIL import Image

from ds_dgemma.data.shapes import BACKGROUND, COLOURS, KINDS, make_shapes, split_of, write_shapes
from ds_dgemma.errors import UserError


def test_a_file_is_well_formed_and_its_pictures_show_what_the_answers_name(tmp_path: Path) -> None:
    file = tmp_path / "new" / "shapes-test.jsonl"
    write_shapes("test", 40, 0, file)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 40
    for row in rows:
        (user, asked), (assistant, answer) = ([*message.values()] for message in row["messages"])
        assert (user, assistant) == ("user", "assistant")
        assert [part["type"] for part in asked] == ["image", "text"]
        assert len(answer) == 8
        assert set(answer[1::2]) <= set(KINDS)
        assert asked[0]["path"].startswith("shapes-test/")
        with Image.open(file.parent / asked[0]["path"]) as picture:
            assert picture.size == (64, 64)
            for cell, (left, top) in enumerate(((0, 0), (32, 0), (0, 32), (32, 32))):
                seen = {colour for _, colour in picture.crop((left, top, left + 32, top + 32)).getcolors() or []}
                assert seen == {BACKGROUND, COLOURS[answer[2 * cell]]}
    assert len(list((tmp_path / "new" / "shapes-test").iterdir())) == 40
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_kinds_differ_in_what_they_cover() -> None:
    covered: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for answer, picture in make_shapes("train", 100, 0):
        for cell in range(4):
            left, top = 32 * (cell % 2), 32 * (cell // 2)
            colours = picture.crop((left, top, left + 32, top + 32)).getcolors() or []
            covered[answer[2 * cell + 1]].append(sum(count for count, colour in colours if colour != BACKGROUND))
    means = {kind: sum(counts) / len(counts) for kind, counts in covered.items()}
    assert means["s"] > means["c"] > means["x"] > means["t"]


def test_the_splits_share_no_answer_and_the_seed_decides_the_rest() -> None:
    train, test = make_shapes("train", 500, 0), make_shapes("test", 500, 0)
    for split, made in (("train", train), ("test", test)):
        answers = [answer for answer, _ in made]
        assert len(set(answers)) == 500
        assert {split_of(answer) for answer in answers} == {split}
    for seed, same in ((0, True), (1, False)):
        again = make_shapes("train", 500, seed)
        assert ([answer for answer, _ in again] == [answer for answer, _ in train]) is same
        assert ([picture.tobytes() for _, picture in again] == [picture.tobytes() for _, picture in train]) is same


def test_writing_again_replaces_pictures_but_nothing_else(tmp_path: Path) -> None:
    file, folder = tmp_path / "train.jsonl", tmp_path / "train"
    for count in (3, 2):
        write_shapes("train", count, count, file)
        assert len(file.read_text().splitlines()) == len([*folder.iterdir()]) == count
    (folder / "notes.txt").write_text("mine")
    kept = file.read_bytes()
    refused = [
        (("train", 1, 0, file), "holds something else"),
        (("train", 0, 0, file), "at least 1"),
        (("test", 40000, 0, tmp_path / "big.jsonl"), "ask for fewer"),
        (("test", 1, 0, folder), "name the JSONL file"),
        (("test", 1, 0, file / "below.jsonl"), "cannot write"),
    ]
    for args, message in refused:
        with pytest.raises(UserError, match=message):
            write_shapes(*args)
    assert file.read_bytes() == kept
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["train", "train.jsonl"]
    assert (folder / "notes.txt").read_text() == "mine"
