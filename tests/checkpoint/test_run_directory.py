"""Where a run starts: its own newest checkpoint, the one that it is told, and never in another job's directory."""

import json
from pathlib import Path

import pytest

from ds_dgemma.checkpoint import run_directory as directory
from ds_dgemma.checkpoint.manifest import write_state
from ds_dgemma.checkpoint.run_directory import (
    COMPLETE,
    begin,
    claim,
    find_start,
    mark_complete,
)
from ds_dgemma.checkpoint.run_state import open_checkpoint, step_directory
from ds_dgemma.checkpoint.same import check_same_data
from ds_dgemma.config.file import load_config
from ds_dgemma.errors import UserError


def write_checkpoint(run: Path, step: int, **facts: object) -> Path:
    """A complete checkpoint without a tensor."""
    path = step_directory(run / "checkpoints", step)
    path.mkdir(parents=True)
    write_state(path, {"step": step, **facts}, {})
    return path


@pytest.fixture
def run(sudoku_run: Path, tmp_path: Path):
    """Open the config of a run in `tmp_path/run`, which has its settings written."""

    def open_config(*overrides: str):
        return load_config(sudoku_run, [f"run.dir={tmp_path}/run", *overrides])

    claim(tmp_path / "run").close()
    begin(open_config(), {})
    return open_config


def start(config) -> int | None:
    found = find_start(config)
    return found.step if found.resumed else None


def test_a_run_starts_from_its_newest_checkpoint(run, tmp_path):
    assert start(run()) is None
    write_checkpoint(tmp_path / "run", 5)
    write_checkpoint(tmp_path / "run", 10)
    assert start(run()) == 10


def test_a_named_checkpoint_of_another_run_is_only_where_this_one_began(run, tmp_path):
    other = write_checkpoint(tmp_path / "other", 15)
    assert start(run(f"run.resume={other}")) == 15
    write_checkpoint(tmp_path / "run", 10)
    assert start(run(f"run.resume={other}")) == 10  # the same command continues


def test_an_older_checkpoint_of_the_same_run_is_refused_while_newer_ones_are_there(run, tmp_path):
    older = write_checkpoint(tmp_path / "run", 5)
    assert start(run(f"run.resume={older}")) == 5
    write_checkpoint(tmp_path / "run", 10)
    with pytest.raises(UserError, match="step-000010"):
        find_start(run(f"run.resume={older}"))


def test_a_named_checkpoint_past_the_last_step_is_refused(run, tmp_path):
    done = write_checkpoint(tmp_path / "other", 20)
    with pytest.raises(UserError, match=r"train\.max_steps is 20"):
        find_start(run(f"run.resume={done}"))


def test_a_directory_has_one_job_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "LOCK_SECONDS", 0)
    first = claim(tmp_path / "run")
    with pytest.raises(UserError, match="in use by another job"):
        claim(tmp_path / "run")
    first.close()
    claim(tmp_path / "run").close()


def test_other_data_under_the_same_name_is_refused(tmp_path):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, 5, data_digest="a", examples=2000))
    check_same_data("train.jsonl", checkpoint, "a", 2000)
    with pytest.raises(UserError, match="2,000 examples then, 40 now"):
        check_same_data("train.jsonl", checkpoint, "b", 40)


def test_a_run_is_complete_until_it_goes_on(run, tmp_path):
    begin(run(), {})
    mark_complete(tmp_path / "run", 10)
    mark_complete(tmp_path / "run", 10)
    assert json.loads((tmp_path / "run" / COMPLETE).read_text()) == {"step": 10}
    begin(run(), {})
    assert not (tmp_path / "run" / COMPLETE).exists()
