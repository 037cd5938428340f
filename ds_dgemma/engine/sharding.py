"""Make parameters that are born partitioned: a rank never holds more of the model than its own ZeRO-3 shards and
one tensor.

Each parameter becomes a ZeRO-3 parameter of its real shape (memory that is reserved, never touched), is partitioned
at once, and only then is its shard filled. Expert parameters are partitioned over the ranks that hold the same
experts.
"""

from typing import Any

import deepspeed
import torch
from torch import nn

from ds_dgemma.checkpoint.load import MakeReal
from ds_dgemma.engine import private


def zero3(deepspeed_config: dict[str, Any], dtype: torch.dtype, expert_parallel_size: int) -> MakeReal:
    """Hold of every parameter just this rank's ZeRO-3 share."""
    replicas = private.expert_replicas(expert_parallel_size)
    init = deepspeed.zero.Init(config_dict_or_path=deepspeed_config, dtype=dtype, enabled=True)

    def make(name: str, parameter: nn.Parameter) -> tuple[nn.Parameter, torch.Tensor, int, int]:
        real: Any = nn.Parameter(
            torch.empty(parameter.shape, dtype=dtype, device=init.local_device), parameter.requires_grad
        )
        real.__dict__.update(parameter.__dict__)
        own = private.partition(real, init, replicas if private.is_expert_parameter(real) else None)
        return real, private.held(real), own.start, own.stop

    return make
