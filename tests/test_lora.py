"""What a LoRA run leaves behind: an adapter that goes on where it ended, alone or merged.

Every topology: `test_topologies.py`. Resumed bit for bit, the base untouched: `test_offload.py`.
"""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ds_dgemma.checkpoint.adapter import TENSORS
from ds_dgemma.checkpoint.export import export_run
from ds_dgemma.checkpoint.run_state import newest
from ds_dgemma.config.optimizer import OptimizerSection
from ds_dgemma.engine.schedule import learning_rate
from ds_dgemma.errors import UserError
from tests.reference.adapters import write_random_adapter
from tests.training import train

pytestmark = pytest.mark.slow

EVERYWHERE = "lora={target_parameters: [experts.gate_up_proj, experts.down_proj], init_lora_weights: false}"
SHARED = ["parallel.expert_parallel_size=2", "train.micro_batch_size=4"]  # by two ranks


def test_adapter_merged_model_and_a_fresh_adapter_on_it_start_from_the_same_loss(sudoku_run, tmp_path):
    short = ["train.max_steps=4", "optimizer.warmup_steps=2"]
    train(sudoku_run, tmp_path / "run", [*short, EVERYWHERE, *SHARED], processes=2)
    export_run(tmp_path / "run", tmp_path / "adapter")
    export_run(tmp_path / "run", tmp_path / "merged", form="merged")

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
    train(sudoku_run, tmp_path / "run", [there, *still, *SHARED, "train.precision=bf16"], processes=2)
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
