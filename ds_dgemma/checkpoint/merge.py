"""Add an adapter to the weights that it adapts: once, though encoder and decoder share them.

PEFT's own merge adds the encoder's copy and the decoder's copy of an adapter to the one weight that both share: twice.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ds_dgemma.checkpoint.weights import WeightReader
from ds_dgemma.model.lora import Factor, Target
from ds_dgemma.model.names import DECODER

ReadFactor = Callable[[Target, Factor], Tensor]  # a whole factor, experts in front


class Merged:
    """The checkpoint's tensors with an adapter added."""

    def __init__(self, targets: Iterable[Target], read: ReadFactor, scaling: float) -> None:
        self._targets = {DECODER + target.name: target for target in targets}
        self._read = read
        self._scaling = scaling

    def change(self, tensor: str, reader: WeightReader, dtype: torch.dtype) -> Tensor | None:
        """W + scaling * B A for an adapted tensor, computed in fp32 or wider; None for one that stays as it is."""
        target = self._targets.get(tensor if tensor in self._targets else tensor.removesuffix(".weight"))
        if target is None:
            return None
        source = reader.read(tensor)
        merged = source.to(torch.promote_types(source.dtype, torch.float32), copy=True)
        A, B = (self._read(target, factor).to(merged.dtype) for factor in ("lora_A", "lora_B"))
        if not target.experts:
            return merged.addmm_(B, A, alpha=self._scaling).to(dtype)
        for expert in range(target.experts):
            merged[expert].addmm_(B[expert], A[expert], alpha=self._scaling)
        return merged.to(dtype)
