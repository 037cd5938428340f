"""Losses depend neither on how a batch is shared out nor on whether that changes within a run.

One process without accumulation is the reference. The run that is held against it is stopped after every second step
and goes on elsewhere: other ranks, expert parallelism, accumulation, ZeRO stage.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from ds_dgemma.errors import EXIT_STOPPED
from tests.resume_matrix import COMPARED, SETTINGS, TOLERANCE
from tests.training import read_metrics, train

pytestmark = pytest.mark.slow

BATCH, STEPS_OF_A_LEG = 8, 2  # the second step shows what became of Adam's state
TRACED = ("tests.engine.traced",)


class Leg(NamedTuple):
    """Where a part of a run is trained."""

    processes: int
    experts: int
    accumulation: int
    stage: int = 3


ALONE = Leg(1, 1, 1)
EVERYWHERE = [Leg(1, 1, 2), Leg(2, 2, 1, stage=1), Leg(4, 2, 1), Leg(2, 2, 2, stage=2), Leg(2, 1, 1)]
ALL_GUESSED, NONE_GUESSED = (f"objective.self_conditioning_probability={p}" for p in (1, 0))
RUNS = {
    "full": (SETTINGS["full"], EVERYWHERE),
    "lora": ([*SETTINGS["lora"], ALL_GUESSED], [Leg(2, 1, 1), Leg(2, 2, 2, stage=2), Leg(1, 1, 1)]),
    "frozen": ([*SETTINGS["frozen"], NONE_GUESSED], [Leg(2, 2, 2), Leg(2, 1, 1), Leg(1, 1, 1)]),
}


def go(config: Path, run_dir: Path, leg: Leg, steps: int, settings: list[str], *traced: str, **how: int) -> list[dict]:
    """Train on a topology, from wherever the run stands."""
    overrides = [
        f"parallel.expert_parallel_size={leg.experts}",
        f"train.micro_batch_size={BATCH // (leg.processes * leg.accumulation)}",
        f"deepspeed=ds_configs/zero{leg.stage}.json",
        f"train.max_steps={steps}",
        "optimizer.warmup_steps=2",
    ]
    return train(config, run_dir, [*overrides, *settings], leg.processes, program=(*TRACED, *traced), **how)


def assert_equal(ours: list[dict], theirs: list[dict], where: object, names: tuple[str, ...] = COMPARED) -> None:
    for a, b in zip(ours, theirs, strict=True):
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=TOLERANCE), f"{where}: {name} at step {a['step']}"


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_moves_from_topology_to_topology_equals_one_process(kind, sudoku_run, tmp_path):
    settings, legs = RUNS[kind]
    last, run_dir = STEPS_OF_A_LEG * len(legs), tmp_path / "run"
    alone = go(sudoku_run, tmp_path / "alone", ALONE, last, settings, "--no-leaves")
    for number, leg in enumerate(legs, start=1):
        step = number * STEPS_OF_A_LEG
        ends_with = 0 if step == last else EXIT_STOPPED
        go(sudoku_run, run_dir, leg, last, settings, "--stop-after", str(step), ends_with=ends_with)
        assert_equal(read_metrics(run_dir), alone[:step], leg)
    if kind != "full":
        ranks = sum(leg.processes for leg in legs)
        assert run_dir.with_suffix(".log").read_text().count("0 changed of ") == ranks


def test_the_routers_loss_does_not_depend_on_the_topology(sudoku_run, tmp_path):
    shutil.copytree(sudoku_run.parent / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["text_config"]["top_k_experts"] = 2  # with all experts chosen it would be a constant
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    settings = ["model.train_router=true", "objective.router_balance_weight=1.0", f"model.path={tmp_path}/model"]
    alone = go(sudoku_run, tmp_path / "alone", ALONE, 3, settings)
    assert all(record["loss_router"] > 2.01 for record in alone)  # 2 when all is even
    assert alone[0]["loss"] == pytest.approx(sum(alone[0][f"loss_{part}"] for part in ("diffusion", "ar", "router")))
    shared = Leg(2, 2, 2)
    assert_equal(go(sudoku_run, tmp_path / "shared", shared, 3, settings), alone, shared, (*COMPARED, "loss_router"))


@pytest.mark.parametrize(
    "settings",
    [["train.activation_checkpointing=full"], ["train.activation_checkpointing=none"], SETTINGS["lora"]],
    ids=["full", "none", "LoRA"],
)
def test_a_layer_is_gathered_three_times_a_micro_step_and_let_go(settings, sudoku_run, tmp_path):
    """To read, to denoise, and for the backward pass; where layers are so large that each is let go after use."""
    live = {
        "max_reuse_distance": 1,
        "max_live_parameters": 0,
        "prefetch_bucket_size": 0,
        "param_persistence_threshold": 0,
    }
    zero = {"stage": 3, **{f"stage3_{name}": value for name, value in live.items()}}
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    go(sudoku_run, tmp_path / "run", Leg(2, 1, 1), 4, [*settings, f"deepspeed={tmp_path}/zero.json"])
    said = (tmp_path / "run.log").read_text()
    wanted = "gathers of a layer's parameter in a micro-step: [3], layers whole at once: 1\n"
    assert said.count(wanted) == 2, said[-2000:]
