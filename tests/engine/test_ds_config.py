"""DeepSpeed's JSON and the run config, joined: what is filled, what is kept, what is refused by name."""

import json
import os
import re
from pathlib import Path
from typing import Any, Literal

import pytest

from ds_dgemma.config.run import RunConfig
from ds_dgemma.engine.ds_config import build_cpu_adam, deepspeed_config
from ds_dgemma.errors import UserError

JSONS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
RANKS = 8
OFFLOADED = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}


@pytest.fixture(autouse=True)
def _in_an_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run_config(precision: str = "bf16", deepspeed: str | Path = "zero.json") -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"dir": "run"},
            "model": {"path": "model"},
            "data": {"train": "train.jsonl"},
            "train": {
                "max_steps": 10,
                "global_batch_size": 64,
                "micro_batch_size": 4,
                "gradient_clipping": 0.5,
                "precision": precision,
            },
            "optimizer": {"lr": 1e-3, "betas": [0.9, 0.99]},
            "deepspeed": deepspeed,
        }
    )


def join(settings: Any, precision: str = "bf16", device: Literal["cpu", "cuda"] = "cpu") -> dict[str, Any]:
    Path("zero.json").write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return deepspeed_config(run_config(precision), RANKS, device)


def refusal(settings: Any, precision: str = "bf16") -> str:
    with pytest.raises(UserError) as error:
        join(settings, precision)
    return str(error.value)


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.stem)
def test_the_jsons_we_ship_leave_the_science_to_the_run_config(path: Path) -> None:
    joined = deepspeed_config(run_config("fp32", path), RANKS, "cpu")
    offloaded = "offload_optimizer" in joined["zero_optimization"]
    assert {key: joined[key] for key in joined if key != "zero_optimization"} == {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": 1e-3,
                "betas": [0.9, 0.99],
                "eps": 1e-8,
                "weight_decay": 1e-4,
                **({} if offloaded else {"torch_adam": True}),
            },
        },
    }
    assert joined["zero_optimization"] == json.loads(path.read_text())["zero_optimization"]


def test_auto_and_equal_values_are_accepted_and_everything_else_goes_through_untouched() -> None:
    given = {
        "train_batch_size": "auto",
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": "auto", "immediate_grad_update": False},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.99], "foreach": False}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "round_robin_gradients": True},
        "wall_clock_breakdown": True,
        "comms_logger": {"enabled": True},
        "_comment": "notes of the user",
    }
    joined = join(given)
    assert joined["train_batch_size"] == 64
    assert joined["bf16"] == {"enabled": True, "immediate_grad_update": False}
    assert joined["optimizer"]["params"]["lr"] == 1e-3
    assert joined["optimizer"]["params"]["foreach"] is False
    for key in ("zero_optimization", "wall_clock_breakdown", "comms_logger", "_comment"):
        assert joined[key] == given[key]


@pytest.mark.parametrize(
    ("device", "offload", "params", "kernel"),
    [
        ("cpu", "none", {}, {"torch_adam": True}),
        ("cuda", "none", {}, {"torch_adam": True, "fused": True}),
        ("cuda", "none", {"fused": False}, {"torch_adam": True, "fused": False}),
        ("cuda", "none", {"foreach": True}, {"torch_adam": True, "foreach": True}),
        ("cuda", "cpu", {}, {}),  # DeepSpeed's CPU Adam
        ("cuda", "cpu", {"torch_adam": True}, {"torch_adam": True, "fused": True}),
    ],
)
def test_adam_is_torchs_fused_on_a_gpu_and_deepspeeds_own_when_offloaded(device, offload, params, kernel) -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": offload}}
    joined = join({"zero_optimization": zero, "optimizer": {"params": params}}, device=device)
    science = {"lr", "betas", "eps", "weight_decay"}
    assert {k: v for k, v in joined["optimizer"]["params"].items() if k not in science} == kernel


def test_a_build_that_was_killed_is_not_waited_for(tmp_path, monkeypatch) -> None:
    from torch.utils.cpp_extension import _get_build_directory

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = Path(_get_build_directory("cpu_adam", False), "lock")
    lock.touch()
    os.utime(lock, (0, 0))
    with pytest.raises(UserError, match=rf"was killed and left {re.escape(str(lock))}. Delete it"):
        build_cpu_adam(join(OFFLOADED))


def test_an_offloaded_optimizer_can_do_without_a_compiler(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"c\+\+ and ninja cannot be found.*zero_force_ds_cpu_optimizer"):
        build_cpu_adam(join(OFFLOADED))
    without = join({"zero_force_ds_cpu_optimizer": False, **OFFLOADED})
    assert without["optimizer"]["params"]["torch_adam"] is True
    build_cpu_adam(without)


def zero(stage: int = 3, **settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **settings}}


@pytest.mark.parametrize(
    ("settings", "named"),  # the JSON's key, and the config's that has the say, or the one that was meant
    [
        ({"train_batch_size": 32}, "train_batch_size 32 train.global_batch_size 64"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu train.micro_batch_size"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps 2"),
        ({"gradient_clipping": 1.0}, "gradient_clipping train.gradient_clipping 0.5"),
        ({"bf16": {"enabled": False}}, "bf16.enabled train.precision"),
        ({"fp16": {"enabled": True}}, "fp16.enabled train.precision"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype"),
        ({"optimizer": {"params": {"lr": 1}}}, "optimizer.params.lr optimizer.lr 0.001"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type AdamW"),
        ({"optimizer": {"params": {"beta": 1}}}, "optimizer.params.beta betas"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler optimizer.lr"),
        ({"expert_parallel": {"enabled": True}}, "expert_parallel parallel.expert_parallel_size"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel"),
        ({"pipeline": {}}, "pipeline"),
        ({"elasticity": {}}, "elasticity"),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op"),
        (zero(zero_hpz_partition_size=8), "zero_hpz_partition_size"),
        (zero(mics_shard_size=8), "mics_shard_size"),
        (zero(zero_quantized_gradients=True), "zero_quantized_gradients"),
        (zero(zero_quantized_weights=True), "zero_quantized_weights"),
        (zero(stage3_gather_16bit_weights_on_model_save=True), "stage3_gather_16bit_weights_on_model_save export"),
        (zero(offload_optimizer={"device": "nvme"}), "offload_optimizer.device nvme"),
        (zero(1, offload_param={"device": "cpu"}), "offload_param 1 3"),
        (zero(0), "zero_optimization.stage 0"),
        (zero(reduce_bucket_sise=1), "reduce_bucket_sise reduce_bucket_size"),
        (zero(offload_param={"pin_memry": True}), "pin_memry pin_memory"),
        (zero(reduce_bucket_size="big"), "zero_optimization.reduce_bucket_size big"),
        ({"zero_optimization": True}, "zero_optimization true"),
        ({"gradient_cliping": 1}, "gradient_cliping"),
        ({"amp": {}}, "AMP"),  # as DeepSpeed says it
    ],
)
def test_a_conflict_is_refused_by_name(settings, named) -> None:
    text = refusal({**zero(), **settings})
    assert any(all(word in line for word in named.split()) for line in text.splitlines()), text


def test_all_conflicts_are_told_at_once_with_the_json_named() -> None:
    text = refusal({**zero(0), "train_batch_size": 1, "gradient_clipping": 2})
    assert text.startswith("3 problems in zero.json\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"bf16": {},\n // no\n}', "zero.json:2:2 is not JSON"),
        ('{"bf16": {}, "bf16": {}}', "zero.json sets bf16 twice"),
        ("[]", "zero.json holds []; expected an object"),
    ],
)
def test_a_broken_json_is_told_with_its_place(text, said) -> None:
    assert re.search(re.escape(said), refusal(text))


def test_a_missing_json_is_named() -> None:
    with pytest.raises(UserError, match=r"gone.json cannot be read"):
        deepspeed_config(run_config(deepspeed="gone.json"), RANKS, "cpu")
