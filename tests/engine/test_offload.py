"""States and weights in host memory, two ranks that share the experts: the same numbers, and the same resume.

What is left out of the test is refused: offload to NVMe, and parameters below stage 3 (`test_ds_config.py`).
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.test_resume import final_state, numbers
from tests.training import train

pytestmark = pytest.mark.slow

CPU = {"device": "cpu"}
OPTIMIZER, PARAMETERS = {"offload_optimizer": CPU}, {"offload_param": {**CPU, "pin_memory": True}}
RUN = [
    "train.max_steps=4", "checkpoint.every=2", "checkpoint.keep_last=3", "optimizer.warmup_steps=2",
    "parallel.expert_parallel_size=2", "train.micro_batch_size=2",
]  # fmt: skip
EXPERT_LORA = "lora={r: 8, target_parameters: [experts.gate_up_proj, experts.down_proj]}"


def offloaded(folder: Path, stage: int, settings: dict, **top_level: object) -> str:
    """An override that names a JSON with these ZeRO settings."""
    path = folder / "zero.json"
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, **settings}
    path.write_text(json.dumps({"zero_optimization": zero, **top_level}))
    return f"deepspeed={path}"


@pytest.fixture(scope="module")
def undisturbed(sudoku_run, tmp_path_factory):
    """Losses and gradient norms without offload, by (precision, extra override)."""
    runs: dict[tuple[str, str], list[dict]] = {}

    def get(precision: str, extra: str) -> list[dict]:
        if (precision, extra) not in runs:
            folder = tmp_path_factory.mktemp("on-device")
            overrides = [*RUN, f"train.precision={precision}", extra, offloaded(folder, 3, {})]
            runs[precision, extra] = train(sudoku_run, folder / "run", [o for o in overrides if o], processes=2)
        return runs[precision, extra]

    return get


@pytest.mark.parametrize(
    ("precision", "stage", "settings", "top_level", "extra"),
    [
        ("fp32", 3, OPTIMIZER | PARAMETERS, {}, ""),
        ("fp32", 3, OPTIMIZER, {"zero_force_ds_cpu_optimizer": False}, ""),
        ("bf16", 2, OPTIMIZER, {}, ""),
        ("bf16", 3, PARAMETERS, {}, EXPERT_LORA),
    ],
    ids=["both", "by torch's AdamW", "stage 2", "parameters, LoRA"],
)
def test_an_offloaded_run_computes_the_same_and_resumes_bit_for_bit(
    precision, stage, settings, top_level, extra, sudoku_run, undisturbed, tmp_path
):
    run_dir = tmp_path / "run"
    overrides = [*RUN, f"train.precision={precision}", offloaded(tmp_path, stage, settings, **top_level)]
    overrides += [extra] if extra else []
    once = train(sudoku_run, run_dir, overrides, processes=2)
    for ours, theirs in zip(once, undisturbed(precision, extra), strict=True):
        tolerance = 1e-5 if precision == "fp32" else 2e-3  # CPU Adam rounds otherwise; bf16 makes more of it
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=20 * tolerance)

    state = final_state(run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-000004")
    assert numbers(train(sudoku_run, run_dir, overrides, processes=2)) == numbers(once)
    assert final_state(run_dir) == state
