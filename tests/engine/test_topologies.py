"""Losses do not depend on how a batch is shared out: ranks, expert parallelism, accumulation, ZeRO stage."""

import json
import shutil
from pathlib import Path

import pytest

from tests.training import train

pytestmark = pytest.mark.slow

SHARED_OUT = [(1, 1, 2), (2, 1, 1), (2, 2, 1), (4, 2, 1)]  # processes, expert-parallel size, accumulation


def run(config: Path, run_dir: Path, processes: int, experts: int, accumulation: int, *more: str) -> list[dict]:
    """Train 20 steps of 8 examples on a topology."""
    micro = 8 // (processes * accumulation)
    overrides = [f"parallel.expert_parallel_size={experts}", f"train.micro_batch_size={micro}", *more]
    return train(config, run_dir, overrides, processes)


@pytest.fixture(scope="module")
def alone(sudoku_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """One process, no accumulation."""
    return run(sudoku_run, tmp_path_factory.mktemp("alone") / "run", 1, 1, 1)


def assert_equal(metrics: list[dict], reference: list[dict], rel: float = 1e-4) -> None:
    assert len(metrics) == len(reference) == 20
    for ours, theirs in zip(metrics, reference, strict=True):
        for name in ("loss", "loss_diffusion", "loss_ar", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=rel), f"{name} at step {ours['step']}"


@pytest.mark.parametrize("topology", SHARED_OUT)
def test_losses_and_gradient_norms_do_not_depend_on_the_topology(topology, alone, sudoku_run, tmp_path):
    assert_equal(run(sudoku_run, tmp_path / "run", *topology), alone)


@pytest.mark.parametrize("probability", [0, 1])
def test_nor_do_they_when_all_or_no_examples_are_self_conditioned(probability, sudoku_run, tmp_path):
    extra = f"objective.self_conditioning_probability={probability}"
    reference = run(sudoku_run, tmp_path / "alone", 1, 1, 1, extra)
    assert_equal(run(sudoku_run, tmp_path / "shared", 2, 2, 2, extra), reference)


@pytest.mark.parametrize("stage", [1, 2])
def test_every_zero_stage_with_experts_gives_the_same_losses(stage, alone, sudoku_run, tmp_path):
    extra = f"deepspeed=ds_configs/zero{stage}.json"
    assert_equal(run(sudoku_run, tmp_path / "run", 2, 2, 1, extra), alone)


def test_the_routers_loss_does_not_depend_on_the_topology(sudoku_run, tmp_path):
    shutil.copytree(sudoku_run.parent / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["text_config"]["top_k_experts"] = 2  # with all experts chosen it would be a constant
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    balanced = ["model.train_router=true", "objective.router_balance_weight=1.0", "train.max_steps=4"]
    more = [f"model.path={tmp_path}/model", "optimizer.warmup_steps=1", *balanced]
    alone = run(sudoku_run, tmp_path / "alone", 1, 1, 1, *more)
    assert all(record["loss_router"] > 2.01 for record in alone)  # 2 when all is even
    assert alone[0]["loss"] == pytest.approx(sum(alone[0][f"loss_{part}"] for part in ("diffusion", "ar", "router")))
    for number, topology in enumerate([(1, 1, 2), (2, 2, 1), (2, 2, 2)]):
        shared = run(sudoku_run, tmp_path / str(number), *topology, *more)
        for ours, theirs in zip(shared, alone, strict=True):
            for name in ("loss", "loss_router", "grad_norm"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), f"{topology}: {name} at {ours['step']}"
