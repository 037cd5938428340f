"""LoRA runs and runs with frozen parts: the same on every topology, exact when resumed, and what they leave behind."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ds_dgemma.checkpoint.adapter import TENSORS
from ds_dgemma.checkpoint.export import export_run
from ds_dgemma.checkpoint.run_state import newest
from ds_dgemma.config import OptimizerSection
from ds_dgemma.engine.schedule import learning_rate
from ds_dgemma.errors import UserError
from tests.reference.adapters import write_random_adapter
from tests.test_resume import NUMBERS, final_state, numbers
from tests.training import read_metrics, train

pytestmark = pytest.mark.slow

TRACED = ("tests.engine.traced",)
STEPS = ["train.max_steps=4", "optimizer.warmup_steps=4", "optimizer.lr=1.5e-4"]
SAVED = [*STEPS, "checkpoint.every=2", "checkpoint.keep_last=3"]
EVERYWHERE = "lora={target_parameters: [experts.gate_up_proj, experts.down_proj], init_lora_weights: false}"
LORA_PLUS = "optimizer.groups=[{match: '*.lora_B', lr: 3e-4, weight_decay: 0.0}]"
LORA = [EVERYWHERE, LORA_PLUS]
FROZEN = "model.freeze=['*.embed_tokens.weight', '*.self_conditioning.*', '*.layers.0.*', '*.experts.down_proj']"


def topology(processes: int, experts: int) -> list[str]:
    return [f"parallel.expert_parallel_size={experts}", f"train.micro_batch_size={8 // processes}"]


def assert_close(ours: list[dict], theirs: list[dict], rel: float = 1e-4) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        for name in NUMBERS:
            assert a[name] == pytest.approx(b[name], rel=rel), f"{name} at step {a['step']}"


def assert_untouched(run_dir: Path, processes: int, dtype: str = "torch.float32") -> None:
    """Every rank has said that its part of the frozen weights is what it was."""
    said = run_dir.with_suffix(".log").read_text()
    assert said.count(f"frozen, dtypes ['{dtype}']") == said.count("0 changed of ") == processes, said[-2000:]


def alone(config: Path, folder: Path, settings: list[str]) -> list[dict]:
    """One process that gathers linear by linear."""
    metrics = train(config, folder / "alone", [*STEPS, *settings], program=(*TRACED, "--no-leaves"))
    assert_untouched(folder / "alone", 1)
    return metrics


@pytest.fixture(scope="module")
def adapted(sudoku_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a LoRA run, experts too, on two ranks that share them."""
    run_dir = tmp_path_factory.mktemp("adapted") / "run"
    train(sudoku_run, run_dir, [*SAVED, *LORA, *topology(2, 2)], processes=2, program=TRACED)
    assert_untouched(run_dir, 2)
    return run_dir


def resumed_equals(config: Path, run_dir: Path, overrides: list[str]) -> None:
    """Without its last checkpoint a run of two ranks ends where it had ended, bit for bit."""
    undisturbed, state = read_metrics(run_dir), final_state(run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-000004")
    assert numbers(train(config, run_dir, overrides, processes=2)) == numbers(undisturbed)
    assert final_state(run_dir) == state


def test_lora_on_any_topology_with_layers_as_leaves_equals_one_process_without_and_the_base_stays(
    adapted, sudoku_run, tmp_path
):
    reference = alone(sudoku_run, tmp_path, LORA)
    assert_close(read_metrics(adapted), reference)
    run_dir = tmp_path / "whole-experts"
    assert_close(train(sudoku_run, run_dir, [*STEPS, *LORA, *topology(2, 1)], 2, program=TRACED), reference)
    assert_untouched(run_dir, 2)


def test_a_resumed_lora_run_is_exact(adapted, sudoku_run, tmp_path):
    run_dir = Path(shutil.copytree(adapted, tmp_path / "run"))
    resumed_equals(sudoku_run, run_dir, [*SAVED, *LORA, *topology(2, 2)])


def test_a_frozen_run_on_two_ranks_equals_one_process_and_the_frozen_parts_stay(sudoku_run, tmp_path):
    run_dir = tmp_path / "shared"
    shared = train(sudoku_run, run_dir, [*STEPS, FROZEN, *topology(2, 2)], processes=2, program=TRACED)
    assert_close(shared, alone(sudoku_run, tmp_path, [FROZEN]))
    assert_untouched(run_dir, 2)


@pytest.mark.parametrize("settings", ["lora={lora_dropout: 0.2}", FROZEN], ids=["dropout", "frozen"])
def test_a_resumed_bf16_run_is_exact(settings, sudoku_run, tmp_path):
    run_dir = tmp_path / "run"
    overrides = [*SAVED, settings, *topology(2, 2), "train.precision=bf16"]
    train(sudoku_run, run_dir, overrides, processes=2, program=TRACED)
    assert_untouched(run_dir, 2, "torch.bfloat16")
    resumed_equals(sudoku_run, run_dir, overrides)


def test_adapter_merged_model_and_a_fresh_adapter_on_it_start_from_the_same_loss(adapted, sudoku_run, tmp_path):
    export_run(adapted, tmp_path / "adapter")
    export_run(adapted, tmp_path / "merged", form="merged")

    once = ["train.max_steps=1"]
    continued = train(sudoku_run, tmp_path / "continued", [*once, EVERYWHERE, f"lora.path={tmp_path / 'adapter'}"])
    merged = f"model.path={tmp_path / 'merged'}"
    fresh = train(sudoku_run, tmp_path / "fresh", [*once, merged, "lora={}"])
    own = "optimizer.groups=[{match: '*.experts.*', lr: 3e-4, weight_decay: 0.0}]"
    whole = train(sudoku_run, tmp_path / "whole", [*once, merged, own])
    for name in ("loss", "loss_diffusion", "loss_ar"):
        assert continued[0][name] == pytest.approx(whole[0][name], rel=1e-5)
        assert fresh[0][name] == pytest.approx(whole[0][name], rel=1e-6)
    assert_first_step_is_each_groups_own(tmp_path / "whole", tmp_path / "merged")

    with pytest.raises(UserError, match="trained the model itself, there is no adapter"):
        export_run(tmp_path / "whole", tmp_path / "none", form="peft")


def test_a_bf16_run_goes_on_from_all_bits_of_an_adapter(sudoku_run, tmp_path):
    model = Path(yaml.safe_load(sudoku_run.read_text())["model"]["path"])
    experts = ("experts.gate_up_proj", "experts.down_proj")
    write_random_adapter(tmp_path / "adapter", model, target_parameters=experts)
    there = f"lora={{r: 4, lora_alpha: 6, target_parameters: [{', '.join(experts)}], path: {tmp_path / 'adapter'}}}"
    still = ["train.max_steps=1", "optimizer.lr=1e-30", "optimizer.min_lr=0", "optimizer.weight_decay=0"]
    train(sudoku_run, tmp_path / "run", [there, *still, *topology(2, 2), "train.precision=bf16"], processes=2)
    export_run(tmp_path / "run", tmp_path / "exported")
    before, after = (load_file(tmp_path / name / TENSORS) for name in ("adapter", "exported"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def assert_first_step_is_each_groups_own(run_dir: Path, model: Path) -> None:
    """Adam's first step moves an element by the learning rate, but for its gradient's sign."""
    rate = learning_rate(0, 1, OptimizerSection())
    state, _ = newest(run_dir / "checkpoints")
    assert state is not None
    before = load_file(model / "model.safetensors")
    for ours, theirs, lr in (
        ("model.layers.1.experts.experts.w2", "model.decoder.layers.1.experts.down_proj", 2 * rate),
        ("model.layers.1.mlp.up_proj.weight", "model.decoder.layers.1.mlp.up_proj.weight", rate),
    ):
        moved = (state.read(ours, "fp32") - before[theirs].flatten()).abs().max()
        assert float(moved) == pytest.approx(lr, rel=2e-2)
