"""Validation's curve over noise levels is a slow computation's, and the same on any number of ranks."""

import json
from pathlib import Path

import pytest

from tests.training import train

GRID = ["validation.every=2", "validation.examples=5", "validation.noise_levels=[0.2, 0.6, 1.0]"]


@pytest.mark.slow
def test_the_curve_is_the_same_on_any_topology_and_at_the_begin_and_the_end(sudoku_run: Path, tmp_path: Path) -> None:
    settings = [
        *GRID,
        f"data.validation={sudoku_run.parent}/train.jsonl",
        "train.max_steps=3",
        "train.micro_batch_size=2",
    ]

    def curve(name: str, processes: int, *more: str) -> list[dict]:
        train(sudoku_run, tmp_path / name, [*settings, *more], processes=processes)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        records = [record for record in map(json.loads, lines) if record.get("kind") == "validation"]
        return [{key: value for key, value in record.items() if key != "kind"} for record in records]

    one, two = curve("one", 1), curve("two", 2, "parallel.expert_parallel_size=2")
    assert [record["step"] for record in one] == [0, 2, 3]
    for ours, theirs in zip(one, two, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
        at = [ours[f"loss_diffusion_at_{level}"] for level in ("0.2", "0.6", "1")]
        assert ours["loss_diffusion"] == pytest.approx(sum(at) / 3)
        assert 0 <= ours["accuracy"] <= 1
        assert ours["loss"] == pytest.approx(ours["loss_diffusion"] + ours["loss_ar"])
