"""A run that is started again resumes bit for bit, whatever it trains and wherever that lies: two ranks that share the
experts; states and weights in host memory compute what they compute on the device.

With torch's AdamW in host memory `test_optimizers.py` runs. What is left out is refused: offload to NVMe, and
parameters below stage 3 (`test_ds_config.py`).
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.resume_matrix import SETTINGS
from tests.test_resume import final_state, numbers
from tests.training import train

pytestmark = pytest.mark.slow

CPU = {"device": "cpu"}
OPTIMIZER, PARAMETERS = {"offload_optimizer": CPU}, {"offload_param": {**CPU, "pin_memory": True}}
RUN = [
    "train.max_steps=4", "checkpoint.every=2", "checkpoint.keep_last=3", "optimizer.warmup_steps=2",
    "parallel.expert_parallel_size=2", "train.micro_batch_size=2",
]  # fmt: skip
FULL, FROZEN = [], SETTINGS["frozen"]
DROPOUT = ["lora={lora_dropout: 0.2}"]  # PEFT has none on experts


def zero(folder: Path, stage: int, settings: dict) -> str:
    """An override that names a JSON with these ZeRO settings."""
    path = folder / "zero.json"
    folder.mkdir(exist_ok=True)
    section = {"stage": stage, "stage3_param_persistence_threshold": 0, **settings}
    path.write_text(json.dumps({"zero_optimization": section}))
    return f"deepspeed={path}"


def once(config: Path, run_dir: Path, settings: list[str]) -> list[dict]:
    """Train, and note what the ranks hold."""
    return train(config, run_dir, settings, processes=2, program=("tests.engine.traced",))


def run_and_resume(config: Path, run_dir: Path, settings: list[str]) -> list[dict]:
    """The same; go on from the middle once more, hold the two against each other."""
    undisturbed = once(config, run_dir, settings)
    state = final_state(run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-000004")
    assert numbers(train(config, run_dir, settings, processes=2)) == numbers(undisturbed)
    assert final_state(run_dir) == state
    return undisturbed


@pytest.mark.parametrize(
    ("precision", "trained", "offloads"),
    [
        ("fp32", FULL, [(3, OPTIMIZER | PARAMETERS)]),
        ("bf16", FULL, [(2, OPTIMIZER)]),
        ("bf16", SETTINGS["lora"], [(3, PARAMETERS)]),
        ("bf16", DROPOUT, []),
        ("bf16", FROZEN, []),
    ],
    ids=["both", "stage 2", "parameters, LoRA of experts", "LoRA with dropout", "frozen"],
)
def test_a_run_resumes_bit_for_bit_and_offloaded_computes_the_same(precision, trained, offloads, sudoku_run, tmp_path):
    settings = [*RUN, *trained, f"train.precision={precision}"]
    first = once if offloads else run_and_resume  # `test_stop.py` and `test_resume.py` resume on the device
    on_device = first(sudoku_run, tmp_path / "run", [*settings, zero(tmp_path, 3, {})])
    if trained:
        said = (tmp_path / "run.log").read_text()
        assert said.count("frozen, dtypes ['torch.bfloat16']") == said.count("0 changed of ") == 2, said[-2000:]
    for stage, where in offloads:
        folder = tmp_path / "offloaded"
        offloaded = run_and_resume(sudoku_run, folder / "run", [*settings, zero(folder, stage, where)])
        for ours, theirs in zip(offloaded, on_device, strict=True):
            tolerance = 1e-5 if precision == "fp32" else 2e-3  # CPU Adam rounds otherwise; bf16 makes more of it
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=20 * tolerance)
