"""Questions answered while training: the same on any topology, and what `evaluate` says of that step's checkpoint."""

import json
from pathlib import Path

import pytest

from ds_dgemma import cli
from tests.training import train

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
    asked = ["--run", f"{tmp_path}/two", "--step", "2", "--data", str(data), "--task", "sudoku", "--limit", "5"]
    assert cli.main(["evaluate", *asked, "--max-denoising-steps", "3", "--out", f"{tmp_path}/report.json"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    manner = {key: value for key, value in report["manner"].items() if key != "seconds"}
    assert {**one[0], **manner} == one[0]
    assert {measure: report[measure] for measure in ("examples", "solved", "cells", "blank_cells")}.items() <= one[
        0
    ].items()
