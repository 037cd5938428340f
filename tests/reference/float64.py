"""Run transformers' own modules in double precision, though they ask for float32 by name."""

import torch
from torch.overrides import TorchFunctionMode


class DoublePrecision(TorchFunctionMode):
    """Requests for float32 (`.float()`, `dtype=torch.float32`, `.to(torch.float32)`) become requests for float64.

    Not active inside a backward pass, so what recomputes a forward there (activation checkpointing) must be off.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0].double()
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*(torch.float64 if a is torch.float32 else a for a in args), **kwargs)
