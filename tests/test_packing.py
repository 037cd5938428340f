"""Packed on ranks that share the experts, examples are learned as they are alone on one."""

from pathlib import Path

import pytest

from ds_dgemma.data.sudoku import write_sudoku
from tests.training import make_run, train

NUMBERS = ("loss", "loss_diffusion", "loss_ar", "grad_norm")


@pytest.mark.slow
def test_packed_rows_under_expert_parallelism_learn_what_single_examples_do(tmp_path: Path) -> None:
    """Eight puzzles of 42 tokens, all of them in every step: in eight rows, or in four of two."""
    config = make_run(tmp_path, top_k=2)
    write_sudoku(4, "train", 8, 1, tmp_path / "train.jsonl")
    steps = ["train.max_steps=4", "optimizer.warmup_steps=1", "optimizer.lr=2e-3"]
    alone = train(config, tmp_path / "alone", steps)
    spread = ["parallel.expert_parallel_size=2", "train.global_batch_size=4", "train.micro_batch_size=2"]
    packed = train(config, tmp_path / "packed", [*steps, *spread, "data.packing=true", "data.max_length=90"], 2)
    assert [step["tokens"] for step in packed] == [step["tokens"] for step in alone]
    for ours, expected in zip(packed, alone, strict=True):
        assert [ours[name] for name in NUMBERS] == pytest.approx([expected[name] for name in NUMBERS], rel=1e-5)
