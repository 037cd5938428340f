"""Losses do not depend on how a batch is shared out: ranks, expert parallelism, accumulation, ZeRO stage."""

import json
import shutil
from pathlib import Path

import pytest

from tests.training import train

pytestmark = pytest.mark.slow

STEPS = 6


def run(config: Path, run_dir: Path, processes: int, experts: int, accumulation: int, *more: str, **how) -> list[dict]:
    """Train on 8 examples a step on a topology."""
    micro = 8 // (processes * accumulation)
    overrides = [f"parallel.expert_parallel_size={experts}", f"train.micro_batch_size={micro}"]
    steps = [f"train.max_steps={STEPS}", "optimizer.warmup_steps=2"]
    return train(config, run_dir, [*overrides, *steps, *more], processes, **how)


@pytest.fixture(scope="module")
def alone(sudoku_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """One process, no accumulation."""
    return run(sudoku_run, tmp_path_factory.mktemp("alone") / "run", 1, 1, 1)


def assert_equal(metrics: list[dict], reference: list[dict], *more: str) -> None:
    assert len(metrics) == len(reference) == STEPS
    for ours, theirs in zip(metrics, reference, strict=True):
        for name in ("loss", "loss_diffusion", "loss_ar", "grad_norm", *more):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), f"{name} at step {ours['step']}"


@pytest.mark.parametrize(
    ("topology", "stage"),
    [((1, 1, 2), 3), ((2, 2, 1), 1), ((2, 2, 1), 2), ((4, 2, 1), 3)],  # processes, expert-parallel size, accumulation
)
def test_losses_and_gradient_norms_depend_neither_on_the_topology_nor_on_the_zero_stage(
    topology, stage, alone, sudoku_run, tmp_path
):
    assert_equal(run(sudoku_run, tmp_path / "run", *topology, f"deepspeed=ds_configs/zero{stage}.json"), alone)


def test_with_checkpointing_a_layer_is_gathered_three_times_and_the_losses_stay(alone, sudoku_run, tmp_path):
    """To read, to denoise, and for the backward pass; where a layer is as large as to be let go when it was used."""
    kept = {"max_reuse_distance": 1, "max_live_parameters": 0, "prefetch_bucket_size": 0}
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, **{f"stage3_{name}": kept[name] for name in kept}}
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    full = ["train.activation_checkpointing=full", f"deepspeed={tmp_path}/zero.json"]
    program = ("tests.engine.traced",)
    assert_equal(run(sudoku_run, tmp_path / "run", 2, 1, 1, *full, program=program), alone)
    said = (tmp_path / "run.log").read_text()
    assert said.count("gathers of a layer's parameter in a micro-step: [3]\n") == 2, said[-2000:]


@pytest.mark.parametrize("probability", [0, 1])
def test_nor_do_they_when_all_or_no_examples_are_self_conditioned(probability, sudoku_run, tmp_path):
    extra = f"objective.self_conditioning_probability={probability}"
    reference = run(sudoku_run, tmp_path / "alone", 1, 1, 1, extra)
    assert_equal(run(sudoku_run, tmp_path / "shared", 2, 2, 2, extra), reference)


def test_the_routers_loss_does_not_depend_on_the_topology(sudoku_run, tmp_path):
    shutil.copytree(sudoku_run.parent / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["text_config"]["top_k_experts"] = 2  # with all experts chosen it would be a constant
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    balanced = ["model.train_router=true", "objective.router_balance_weight=1.0"]
    more = [f"model.path={tmp_path}/model", *balanced]
    alone = run(sudoku_run, tmp_path / "alone", 1, 1, 1, *more)
    assert all(record["loss_router"] > 2.01 for record in alone)  # 2 when all is even
    assert alone[0]["loss"] == pytest.approx(sum(alone[0][f"loss_{part}"] for part in ("diffusion", "ar", "router")))
    assert_equal(run(sudoku_run, tmp_path / "shared", 2, 2, 2, *more), alone, "loss_router")
