"""Make parameters that are born partitioned: a rank never holds more of the model than its own ZeRO-3 shards and
one tensor.

Each parameter becomes a ZeRO-3 parameter of its real shape (memory that is reserved, never touched), is partitioned
at once, and only then is its shard filled. Expert parameters are partitioned over the ranks that hold the same
experts. Source: deepspeed 0.19.8 `runtime/zero/partition_parameters.py` (`Init._convert_to_deepspeed_param`).
"""

from typing import Any

import deepspeed
import torch
from deepspeed.utils import groups
from torch import nn

from ds_dgemma.checkpoint.load import MakeReal


def expert_group_name(size: int) -> str:
    """DeepSpeed's name for the groups of an expert-parallel size."""
    return f"ep_size_{size}"


def zero3(deepspeed_config: dict[str, Any], dtype: torch.dtype, expert_parallel_size: int) -> MakeReal:
    """Hold of every parameter just this rank's ZeRO-3 share."""
    groups._create_expert_and_data_parallel(expert_parallel_size)  # the engine finds and reuses them
    init = deepspeed.zero.Init(config_dict_or_path=deepspeed_config, dtype=dtype, enabled=True)
    replicas = groups._get_expert_data_parallel_group(expert_group_name(expert_parallel_size))

    def make(name: str, parameter: nn.Parameter) -> tuple[nn.Parameter, torch.Tensor, int, int]:
        real: Any = nn.Parameter(
            torch.empty(parameter.shape, dtype=dtype, device=init.local_device), parameter.requires_grad
        )
        real.__dict__.update(parameter.__dict__)
        if is_expert_parameter(real):
            real.ds_zero_partition_process_group = replicas
        numel = real.numel()
        init._convert_to_deepspeed_param(real)
        real.partition()
        share = real.ds_tensor.numel()
        start = min(real.ds_zero_partition_rank * share, numel)
        return real, real.ds_tensor.data, start, min(start + share, numel)

    return make


def is_expert_parameter(parameter: torch.Tensor) -> bool:
    """Whether AutoEP tagged this parameter as one rank's part of the experts."""
    return getattr(parameter, "ds_zero_placement_family", None) == "autoep_expert"
