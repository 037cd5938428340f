"""Questions answered while training: the same on any topology, and what `evaluate` says of that step's checkpoint."""

import json
from pathlib import Path

import pytest

from ds_dgemma import cli
from ds_dgemma.config.file import load_config
from ds_dgemma.errors import EXIT_USER_ERROR
from ds_dgemma.launch.keep_going import completed_step
from tests.training import start_ranks, train

EXAM = ["evaluation.every=2", "evaluation.task=sudoku", "evaluation.examples=5", "evaluation.batch_size=2"]
RUN = [
    "train.max_steps=3",
    "train.micro_batch_size=2",
    "checkpoint.every=2",
    "evaluation.sampler.max_denoising_steps=3",
]


@pytest.mark.slow
def test_shares_are_those_of_evaluate_on_the_checkpoint_on_any_topology(sudoku_run: Path, tmp_path: Path) -> None:
    data = sudoku_run.parent / "train.jsonl"

    def exams(name: str, processes: int, *more: str) -> list[dict]:
        settings = [*EXAM, *RUN, f"data.validation={data}", *more]
        train(sudoku_run, tmp_path / name, settings, processes=processes)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record.get("kind") == "evaluation"]

    one, two = exams("one", 1), exams("two", 2, "parallel.expert_parallel_size=2")
    assert [record["step"] for record in one] == [2, 3]
    assert one == two
    (tmp_path / "own.py").write_text("def late(row, answer):\n    assert not answer\n    return 0\n")
    failed = exams("own", 1, f"evaluation.task=python:{tmp_path}/own.py:late", "evaluation.sampler.t_max=0.9")
    assert [record["step"] for record in failed] == [2, 3]  # a scorer is no reason to end a training
    assert all("late failed: AssertionError" in record["failed"] for record in failed)
    asked = ["--run", f"{tmp_path}/two", "--step", "2", "--data", str(data), "--task", "sudoku", "--limit", "5"]
    assert cli.main(["evaluate", *asked, "--max-denoising-steps", "3", "--out", f"{tmp_path}/report.json"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    manner = {key: value for key, value in report["manner"].items() if key != "seconds"}
    assert {**one[0], **manner} == one[0]
    assert {measure: report[measure] for measure in ("examples", "solved", "cells", "blank_cells")}.items() <= one[
        0
    ].items()


@pytest.mark.slow
def test_a_run_that_gets_no_better_ends_and_is_complete(sudoku_run: Path, tmp_path: Path) -> None:
    """An untrained model solves nothing, so the first measure stays the best; more patience goes on from there."""
    run_dir = tmp_path / "run"
    asked = [*EXAM, "evaluation.every=1", "evaluation.examples=2", f"data.validation={sudoku_run.parent}/train.jsonl"]
    wanted = ["evaluation.sampler.max_denoising_steps=1", "checkpoint.best_by=evaluation/solved"]

    def steps(patience: int) -> list[int]:
        settings = [*asked, *wanted, f"train.early_stopping_patience={patience}"]
        return [record["step"] for record in train(sudoku_run, run_dir, settings)]

    assert steps(2) == [1, 2, 3]
    assert json.loads((run_dir / "complete.json").read_text()) == {"step": 3, "early_stopping_patience": 2}
    config = load_config(run_dir / "config.yaml")
    assert completed_step(config) == 3
    log = run_dir.with_suffix(".log").read_text()
    assert "stopped early after step 3: evaluation/solved was best with 0.0000 at step 1, and 2 measurements" in log
    assert steps(2) == [1, 2, 3]
    assert steps(3) == [1, 2, 3, 4]
    settings = [*asked, "checkpoint.best_by=evaluation/cell", f"run.dir={tmp_path}/other"]
    (rank,) = start_ranks(sudoku_run, settings, 1, tmp_path / "log")
    assert rank.wait(200) == EXIT_USER_ERROR
    assert "It measures: solved, cells, blank_cells, stopped, steps_per_canvas." in (tmp_path / "log").read_text()
