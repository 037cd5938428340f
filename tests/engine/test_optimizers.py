"""Muon against its rule written out in float64, on whatever topology, from memory or offloaded, and resumed."""

import json
from pathlib import Path

import pytest
import torch

from ds_dgemma.checkpoint.run_state import StateReader, open_checkpoint, step_directory
from ds_dgemma.engine.optimizers import is_muon_matrix
from ds_dgemma.errors import EXIT_STOPPED, EXIT_USER_ERROR
from tests.engine.test_topologies import ALONE, Leg, assert_equal, go
from tests.training import read_metrics, start_ranks

pytestmark = pytest.mark.slow

STEPS, LR, EXPERTS_LR, DECAY, MOMENTUM = 4, 0.02, 0.01, 0.1, 0.95
SETTINGS = ["train.gradient_clipping=0", "checkpoint.every=1", "checkpoint.keep_last=9"]
MUON = [
    "optimizer.type=muon",
    f"optimizer.weight_decay={DECAY}",
    f"optimizer.groups=[{{match: '*.experts.*', lr: {EXPERTS_LR}, weight_decay: 0.0}}]",
]


def state_of(run_dir: Path, step: int) -> StateReader:
    return StateReader(open_checkpoint(step_directory(run_dir / "checkpoints", step)))


def shapes_of(model: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by its name in the stack."""
    from ds_dgemma.model.build import build_stack
    from ds_dgemma.model.spec import read_spec

    stack = build_stack(read_spec(str(model)))
    return {f"model.{name}": tuple(parameter.shape) for name, parameter in stack.named_parameters()}


def orthogonal(update: torch.Tensor) -> torch.Tensor:
    """Five steps of the quintic Newton-Schulz iteration, in float64, one matrix."""
    x = update / update.norm()
    if x.shape[0] > x.shape[1]:
        return orthogonal(update.T).T
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def test_muon_makes_the_updates_of_its_rule_from_adamws_gradients(sudoku_run, tmp_path):
    plain = [*SETTINGS, f"optimizer.weight_decay={DECAY}", f"optimizer.betas=[{MOMENTUM}, 0.99]"]
    go(sudoku_run, tmp_path / "adamw", ALONE, STEPS, plain, "--stop-after", "1", ends_with=EXIT_STOPPED)
    metrics = go(sudoku_run, tmp_path / "muon", Leg(2, 2, 2), STEPS, [*SETTINGS, *MUON])
    adamw, states = state_of(tmp_path / "adamw", 1), [state_of(tmp_path / "muon", step) for step in range(1, STEPS + 1)]
    scales = [record["lr"] / metrics[1]["lr"] for record in metrics]  # the warm-up ends with the second step
    seen = {True: 0, False: 0}
    for name, shape in shapes_of(sudoku_run.parent / "model").items():
        if name not in adamw:
            continue
        is_muons = is_muon_matrix(name, len(shape))
        seen[is_muons] += 1
        if not is_muons:
            for kind in ("fp32", "exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(states[0].read(name, kind), adamw.read(name, kind), rtol=1e-4, atol=1e-6)
            continue
        of_gradient = adamw.read(name, "exp_avg")  # the share that either takes in
        torch.testing.assert_close(states[0].read(name, "momentum_buffer"), of_gradient, rtol=1e-4, atol=1e-7)
        lr, decay = (EXPERTS_LR, 0.0) if ".experts." in name else (LR, DECAY)
        for before, after, scale in zip(states, states[1:], scales[1:], strict=False):
            old, new, old_m, new_m = (
                state.read(name, kind).double().view(-1, *shape[-2:])
                for kind in ("fp32", "momentum_buffer")
                for state in (before, after)
            )
            update = (new_m - MOMENTUM * old_m) + MOMENTUM * new_m  # Nesterov's: (1 - momentum) of the gradient, and it
            stretch = max(1, shape[-2] / shape[-1]) ** 0.5
            for matrix in range(len(old)):
                step = lr * scale * stretch * orthogonal(update[matrix])
                expected = old[matrix] * (1 - lr * scale * decay) - step
                torch.testing.assert_close(new[matrix], expected, rtol=1e-4, atol=1e-4 * float(step.abs().max()))
    assert seen[True] >= 20
    assert seen[False] >= 10


def test_with_muon_a_run_moves_through_topologies_and_host_memory_and_equals_one_process(sudoku_run, tmp_path):
    alone = go(sudoku_run, tmp_path / "alone", ALONE, STEPS, [*SETTINGS, *MUON])
    cpu = {"device": "cpu"}
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "offload_optimizer": cpu, "offload_param": cpu}
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    offloaded = [*SETTINGS, *MUON, f"deepspeed={tmp_path}/zero.json"]
    stops = ["--stop-after", "2"]
    go(sudoku_run, tmp_path / "run", Leg(2, 1, 2), STEPS, offloaded, *stops, ends_with=EXIT_STOPPED)
    other = [f"run.dir={tmp_path}/other", f"run.resume={tmp_path}/run/checkpoints/step-000002"]
    [rank] = start_ranks(sudoku_run, other, 1, tmp_path / "other.log")
    assert rank.wait(300) == EXIT_USER_ERROR
    assert "optimizer.type: adamw, but step-000002 was written by muon" in (tmp_path / "other.log").read_text()
    go(sudoku_run, tmp_path / "run", Leg(2, 2, 1), STEPS, [*SETTINGS, *MUON])
    assert_equal(read_metrics(tmp_path / "run"), alone, "moved")
