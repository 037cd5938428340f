"""DeepSpeed's JSON joined with the run config: a dict for `deepspeed.initialize`, or every conflict at once.

YAML owns the science, the JSON how ZeRO runs. What both could say (batch sizes, clipping, precision, Adam) is
filled from YAML; "auto" in the JSON means the same; a different value is refused, for neither should win in
silence. The rest goes to DeepSpeed as it stands, but for what DeepSpeed would ignore here, would refuse only
after the model is loaded (AutoEP with ZeRO-3), or would do beside this project's own. DeepSpeed's config
classes then check what is left.
Sources (deepspeed 0.19.8): runtime/config.py, runtime/zero/config.py, and of runtime/engine.py
`_validate_zero3_moe_compatibility` and `_do_optimizer_sanity_check`.
"""

import copy
import json
import os
import shutil
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from pydantic_core import to_jsonable_python

from ds_dgemma.config.division import check_topology
from ds_dgemma.config.run import RunConfig
from ds_dgemma.config.schema import show
from ds_dgemma.config.section import section_of
from ds_dgemma.errors import UserError, did_you_mean, first_line, one_line_each

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of weights and activations, by train.precision

# Refused in any form, and why.
_REFUSED_KEYS = {
    "scheduler": "the learning rate follows optimizer.lr, min_lr and warmup_steps of the run config",
    "expert_parallel": "experts are placed without it; set parallel.expert_parallel_size in the run config",
    "tensor_parallel": "tensor parallelism (AutoTP) is not supported",
    "pipeline": "pipeline parallelism is not supported",
    "elasticity": "DeepSpeed has removed elastic training; a run resumes on any number of ranks without it",
    "activation_checkpointing": "set train.activation_checkpointing in the run config",
    "checkpoint": "training state is written by ds_dgemma; see the checkpoint section of the run config",
    "data_efficiency": "data comes from the run config, so DeepSpeed would ignore it",
    "wandb": "set tracking.wandb in the run config",
    "bfloat16": 'this is an old name of "bf16"',
    "zero_optimization.mics_shard_size": "DeepSpeed has removed MiCS",
    "zero_optimization.mics_hierarchical_params_gather": "DeepSpeed has removed MiCS",
    "zero_optimization.zenflow": "ZenFlow's late updates are not supported",
    "zero_optimization.cpu_offload": 'the name today is "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'the name today is "offload_param": {"device": "cpu"}',
}

_OFF = (None, False, 0)
_ON = (None, True)
_ONE = (None, 0, 1)
_NOT_ON_NVME = (None, "none", "cpu")
_NO_16BIT_SAVE = "AutoEP with ZeRO-3 refuses save_16bit_model; `ds-dgemma export` writes the weights"
_NO_QUANTIZED = "quantized communication is not supported with expert groups"

# Values that are allowed (None: left out), and why no other.
_REFUSED_VALUES: dict[str, tuple[tuple[Any, ...], str]] = {
    "sequence_parallel_size": (_ONE, "AutoEP with ZeRO-3 refuses sequence parallelism"),
    "managed_gradient_accumulation": (_ON, "the training loop lets DeepSpeed count micro-batches"),
    "gradient_allreduce_op": ((None, "mean"), "the loss is scaled for averaged gradients"),
    "use_data_before_expert_parallelism": (_OFF, "an expert group is made of neighbouring ranks here"),
    "torch_autocast.enabled": (_OFF, "train.precision of the run config sets the arithmetic"),
    "bf16.bf16_master_weights_and_grads": (_OFF, "master weights and accumulated gradients are fp32"),
    "bf16.bf16_optimizer_states": (_OFF, "optimizer states are fp32"),
    "bf16.check_grad_overflow": (_ON, "a step with NaN would be made"),
    "prescale_gradients": (_OFF, "the loss is scaled for averaged gradients"),
    "gradient_predivide_factor": (_ONE, "the loss is scaled for averaged gradients"),
    "autotuning.enabled": (_OFF, "autotuning is not supported"),
    "zero_optimization.stage3_module_granularity_threshold": (
        _OFF,
        "a layer is the unit of gathering here, and this would choose others",
    ),
    "compile.deepcompile": (_OFF, "the engine is not compiled, so DeepSpeed would ignore it"),
    "hybrid_engine.enabled": (_OFF, "the hybrid engine is not supported"),
    "zero_optimization.zero_hpz_partition_size": (_ONE, "AutoEP with ZeRO-3 refuses hpZ"),
    "zero_optimization.zero_quantized_gradients": (_OFF, "AutoEP with ZeRO-3 refuses quantized gradients"),
    "zero_optimization.zero_quantized_weights": (_OFF, _NO_QUANTIZED),
    "zero_optimization.zero_quantized_nontrainable_weights": (_OFF, _NO_QUANTIZED),
    "zero_optimization.gather_16bit_weights_on_model_save": (_OFF, _NO_16BIT_SAVE),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": (_OFF, _NO_16BIT_SAVE),
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (_OFF, _NO_16BIT_SAVE),
    "zero_optimization.compute_grad_norm": (_ON, "every step's gradient norm is recorded"),
    "zero_optimization.legacy_stage1": (_OFF, "DeepSpeed has removed it"),
    "zero_optimization.offload_param.device": (_NOT_ON_NVME, "weights are loaded into memory"),
    "zero_optimization.offload_optimizer.device": (
        _NOT_ON_NVME,
        "AutoEP with ZeRO-3 refuses to checkpoint an optimizer on NVMe",
    ),
    "zero_optimization.offload_optimizer.ratio": ((None, 1), "half-offloaded states are not supported"),
    "zero_optimization.offload_optimizer.super_offload": (_OFF, "SuperOffload is not supported"),
}

_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
_OFFLOAD_DEVICE = "zero_optimization.offload_optimizer.device"
_LONGEST_BUILD = 900  # seconds; torch waits for ever for the lock of a build
_OWNED_ADAM_PARAMS = ("lr", "betas", "eps", "weight_decay")
_FREE_ADAM_PARAMS = (
    "torch_adam",
    "fused",
    "foreach",
    "fp32_optimizer_states",
)  # which kernel: the JSON's to say

# DeepSpeed ignores an unknown key at the top level, so a misspelt one would be lost without a word.
_TOP_LEVEL = """
activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comet comms_logger
communication_data_type compile csv_monitor data_efficiency data_parallel_size data_types
dataloader_drop_last datastates_ckpt disable_allgather disable_python_gc dump_state elasticity
expert_parallel flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping
gradient_predivide_factor hybrid_engine log_level managed_gradient_accumulation memory_breakdown
optimizer pipeline prescale_gradients scheduler seq_parallel_communication_data_type
sequence_parallel_size steps_per_print tensor_parallel tensorboard timers torch_autocast
train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size
wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
zero_optimization
""".split()  # noqa: SIM905


def deepspeed_config(config: RunConfig, world_size: int, device: str) -> dict[str, Any]:
    """Return all that `deepspeed.initialize` is told; raise `UserError` with every conflict at once."""
    accumulation = check_topology(config, world_size)
    settings = read_json(config.deepspeed)
    problems = [*_shape_problems(settings), *_refusals(settings), *_misspelt(settings)]
    if not problems:
        problems = [
            *_stage_problems(settings),
            *_optimizer_problems(settings),
            *_monitor_problems(settings),
            *_fill_from_yaml(settings, config, accumulation),
        ]
    if config.optimizer.type == "muon" and not problems:
        problems = list(_fill_for_muon(settings))
    if not problems:
        _choose_adam(settings, device)
        problems = list(_deepspeed_problems(settings))
    if problems:
        raise one_line_each(str(config.deepspeed), problems)
    return settings


def zero_config(settings: dict[str, Any]) -> Any:
    """DeepSpeed's own reading of the ZeRO block (`DeepSpeedZeroConfig`), its defaults filled in."""
    from deepspeed.runtime.zero.config import get_zero_config

    return get_zero_config(settings)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a key given twice is an error, as it is to DeepSpeed."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise UserError(f"{path} sets {', '.join(twice)} twice in one block. Keep one of each.")
        return dict(pairs)

    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        advice = "JSON has no comments and no comma before a closing bracket"
        raise UserError(f"{path}:{error.lineno}:{error.colno} is not JSON: {error.msg}; {advice}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}. Name DeepSpeed's JSON in `deepspeed`.") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds {show(settings)}; expected an object of DeepSpeed settings, {{...}}.")
    return settings


def _shape_problems(settings: dict[str, Any]) -> Iterator[str]:
    """The blocks that we read or fill must be objects."""
    for key in ("zero_optimization", "optimizer", "optimizer.params", "bf16", "fp16", "data_types"):
        found = _get(settings, key, {})
        if not isinstance(found, dict):
            yield f"{key} = {show(found)}  expected an object, {{...}}"


def _refusals(settings: dict[str, Any]) -> Iterator[str]:
    for key, reason in _REFUSED_KEYS.items():
        if _get(settings, key, _ABSENT) is not _ABSENT:
            yield f"{key}  {reason}: remove it from the JSON"
    for key, (allowed, reason) in _REFUSED_VALUES.items():
        found = _get(settings, key)
        if found != "auto" and found not in allowed:
            yield f"{key} = {show(found)}  {reason}: remove it from the JSON"


def _misspelt(settings: dict[str, Any]) -> Iterator[str]:
    for key in settings:
        if key not in _TOP_LEVEL and key.strip("_/#").lower() != "comment":
            yield f"{key}  DeepSpeed has no such setting and would ignore it.{did_you_mean(key, _TOP_LEVEL)}"


def _stage_problems(settings: dict[str, Any]) -> Iterator[str]:
    stage = _get(settings, "zero_optimization.stage", 0)
    if type(stage) is not int:
        yield f"zero_optimization.stage = {show(stage)}  expected 1, 2 or 3"
    elif stage == 0:
        yield (
            "zero_optimization.stage = 0  is not supported: with expert parallelism every rank would clip by the norm "
            "of its own experts. Use stage 1, 2 or 3; on one rank stage 1 is the same training"
        )
    for block, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        device = _get(settings, f"zero_optimization.{block}.device")
        if device not in (None, "none") and stage not in stages:
            fits = " or ".join(map(str, stages))
            yield f"zero_optimization.{block}  is ignored at stage {stage}: use stage {fits}, or remove it"


def _optimizer_problems(settings: dict[str, Any]) -> Iterator[str]:
    kind = _get(settings, "optimizer.type", "AdamW")
    if str(kind).lower() not in ("adam", "adamw"):
        yield f"optimizer.type = {show(kind)}  expected AdamW; its settings are in the run config"
    for name in _get(settings, "optimizer.params", {}):
        allowed = [*_OWNED_ADAM_PARAMS, *_FREE_ADAM_PARAMS]
        if name not in allowed:
            hint = did_you_mean(name, allowed) or f" Allowed: {', '.join(allowed)}."
            yield f"optimizer.params.{name}  is not a setting of AdamW here.{hint}"
    if _get(settings, "optimizer.params.fused") and _get(settings, "optimizer.params.foreach"):
        yield "optimizer.params  fused and foreach exclude each other: keep one"


def _monitor_problems(settings: dict[str, Any]) -> Iterator[str]:
    """What DeepSpeed would find out after the model is loaded."""
    for key, package in (("tensorboard", "tensorboard"), ("comet", "comet_ml")):
        if _get(settings, f"{key}.enabled") and find_spec(package) is None:
            yield f"{key}.enabled  needs the package {package}: pip install {package}, or remove it from the JSON"
    every = _get(settings, "steps_per_print")
    if every is not None and type(every) is not int:
        yield f"steps_per_print = {show(every)}  expected a whole number"
    level = _get(settings, "log_level", "info")
    if level not in _LOG_LEVELS:
        yield f"log_level = {show(level)}  expected {', '.join(_LOG_LEVELS)}"


def _fill_from_yaml(settings: dict[str, Any], config: RunConfig, accumulation: int) -> Iterator[str]:
    """Set what YAML owns where the JSON leaves it open, in place; tell where the JSON says something else."""
    train = config.train
    precision = f"train.precision is {train.precision}"
    steps = f"train.global_batch_size / (train.micro_batch_size × ranks) is {accumulation}"
    owned = {
        "train_batch_size": (train.global_batch_size, "train.global_batch_size is {}"),
        "train_micro_batch_size_per_gpu": (train.micro_batch_size, "train.micro_batch_size is {}"),
        "gradient_accumulation_steps": (accumulation, steps),
        "gradient_clipping": (train.gradient_clipping, "train.gradient_clipping is {}"),
        "bf16.enabled": (train.precision == "bf16", precision),
        "fp16.enabled": (False, precision),
        "data_types.grad_accum_dtype": ("fp32", "train.precision has gradients accumulated in {}"),
    }
    for name in _OWNED_ADAM_PARAMS:
        owned[f"optimizer.params.{name}"] = (
            to_jsonable_python(getattr(config.optimizer, name)),
            f"optimizer.{name} is {{}}",
        )
    for key, (value, said) in owned.items():
        found = _get(settings, key, "auto")
        if found == "auto":
            _set(settings, key, value)
        elif found != value:
            said = f"{said.format(show(value))} in the run config"
            yield f"{key} = {show(found)}, but {said}: remove it from the JSON, or make them equal"
    settings["optimizer"].setdefault("type", "AdamW")
    settings.setdefault("zero_optimization", {})


def _fill_for_muon(settings: dict[str, Any]) -> Iterator[str]:
    """What DeepSpeed's Muon needs: whole gradients (`stage3.py`), and next to it torch's AdamW, in host memory too."""
    stage = settings["zero_optimization"].get("stage")
    if stage != 3:
        yield f"zero_optimization.stage = {show(stage)}  optimizer.type muon needs stage 3 (ds_configs/zero3.json)"
    wanted = {"zero_optimization.reduce_scatter": False, "zero_force_ds_cpu_optimizer": False}
    for key, value in wanted.items():
        found = _get(settings, key)
        if found not in (None, value):
            yield f"{key} = {show(found)}  optimizer.type muon needs {show(value)}: remove it from the JSON"
        _set(settings, key, value)


def _choose_adam(settings: dict[str, Any], device: str) -> None:
    """torch's AdamW, fused on a GPU; for an offloaded optimizer DeepSpeed's CPU Adam, unless the JSON does without."""
    params, offloaded = settings["optimizer"]["params"], _get(settings, _OFFLOAD_DEVICE) == "cpu"
    if not offloaded or settings.get("zero_force_ds_cpu_optimizer") is False:
        params.setdefault("torch_adam", True)
    if (device == "cuda" or offloaded) and params.get("torch_adam") and "foreach" not in params:
        params.setdefault("fused", True)  # on the CPU too: no copies of the states


def build_cpu_adam(settings: dict[str, Any]) -> None:
    """Compile and load DeepSpeed's CPU Adam where these joined settings use it: a minute the first time on a machine.

    Raises:
        UserError: what it is compiled with is missing, that failed, or a build that was killed would be waited for.
    """
    if _get(settings, _OFFLOAD_DEVICE) != "cpu" or _get(settings, "optimizer.params.torch_adam"):
        return
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import CPUAdamBuilder  # pyright: ignore[reportAttributeAccessIssue]
    from torch.utils.cpp_extension import _get_build_directory

    compiler = os.environ.get("CXX", "c++")
    missing = [] if installed_ops.get(CPUAdamBuilder.NAME) else [t for t in (compiler, "ninja") if not shutil.which(t)]
    advice = (
        'Or let torch\'s AdamW update in host memory, more slowly: "zero_force_ds_cpu_optimizer": false in the '
        "DeepSpeed JSON."
    )
    if missing:
        raise UserError(
            f"offload_optimizer: DeepSpeed's CPU Adam is compiled at run time, and {' and '.join(missing)} cannot be "
            f"found. Install a C++ compiler (g++) and ninja, and have them on PATH (an activated .venv has ninja). "
            f"{advice}"
        )
    lock = Path(_get_build_directory(CPUAdamBuilder.NAME, False), "lock")
    if lock.exists() and time.time() - lock.stat().st_mtime > _LONGEST_BUILD:
        raise UserError(f"offload_optimizer: a build of DeepSpeed's CPU Adam was killed and left {lock}. Delete it.")
    try:
        CPUAdamBuilder().load(verbose=False)
    except Exception as error:  # whatever the build raises, it is this machine's tool chain
        raise UserError(
            f"offload_optimizer: DeepSpeed's CPU Adam did not build: {first_line(error)}. {advice}"
        ) from error


def _deepspeed_problems(settings: dict[str, Any]) -> Iterator[str]:
    """What DeepSpeed's own config classes say, on one rank's view: the batch sizes are checked already."""
    from deepspeed.runtime.config import DeepSpeedConfig  # seconds to import, so only when all else is right

    one_rank = {key: value for key, value in settings.items() if key != "train_batch_size"}
    try:
        DeepSpeedConfig(copy.deepcopy(one_rank))
    except ValidationError as error:
        yield from _translate(error)
    except Exception as error:  # whatever type DeepSpeed raises for a setting, the setting is the user's to mend
        yield f"DeepSpeed refuses it: {first_line(error) or type(error).__name__}"


def _translate(error: ValidationError) -> Iterator[str]:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    in_zero = error.title == DeepSpeedZeroConfig.__name__
    block = "zero_optimization" if in_zero else error.title
    for found in error.errors(include_url=False):
        *above, name = map(str, found["loc"] or ("",))
        key = ".".join([block, *above, name])
        if found["type"] == "extra_forbidden" and in_zero:
            section = section_of(DeepSpeedZeroConfig.model_fields[above[0]]) if above else DeepSpeedZeroConfig
            known = [field.alias or key for key, field in section.model_fields.items()] if section else []
            yield f"{key}  is unknown to DeepSpeed.{did_you_mean(name, known)}"
        else:
            yield f"{key} = {show(found['input'])}  {found['msg']}"


_ABSENT = object()


def _get(settings: dict[str, Any], key: str, default: Any = None) -> Any:
    value: Any = settings
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return default
        value = value[part]
    return value


def _set(settings: dict[str, Any], key: str, value: Any) -> None:
    *blocks, name = key.split(".")
    for block in blocks:
        settings = settings.setdefault(block, {})
    settings[name] = value
