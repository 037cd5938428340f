"""What tests share: a tiny checkpoint, puzzles, and a run config over them."""

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads fight over two cores

from ds_dgemma.data.sudoku import write_sudoku
from ds_dgemma.tools.tiny import make_tiny

RUN = """
run: {{dir: {folder}/run}}
model: {{path: {folder}/model}}
data: {{train: {folder}/train.jsonl, workers: 0}}
train: {{max_steps: 20, global_batch_size: 8, micro_batch_size: 8, precision: fp32}}
optimizer: {{lr: 1.5e-4, min_lr: 1.5e-5, warmup_steps: 25}}
checkpoint: {{every: 0}}
deepspeed: {repository}/ds_configs/zero3.json
"""


@pytest.fixture(scope="session")
def sudoku_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run config (fp32, ZeRO-3, one rank) with its tiny model and 64 puzzles; tests override run.dir."""
    folder = tmp_path_factory.mktemp("sudoku")
    make_tiny("sudoku4", folder / "model")
    # A choice of experts is discrete: a near tie swaps by rounding, and the loss jumps. Without a choice it cannot.
    config = json.loads((folder / "model/config.json").read_text())
    config["text_config"]["top_k_experts"] = config["text_config"]["num_experts"]
    (folder / "model/config.json").write_text(json.dumps(config))
    write_sudoku(4, "train", 64, 1, folder / "train.jsonl")
    repository = Path(__file__).resolve().parent.parent
    (folder / "run.yaml").write_text(RUN.format(folder=folder, repository=repository))
    return folder / "run.yaml"
