"""Random adapters on disk, made without training."""

from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ds_dgemma.checkpoint.adapter_export import write_adapter
from ds_dgemma.checkpoint.merge import ReadFactor
from ds_dgemma.config.run import LoraSection
from ds_dgemma.model.build import build_stack
from ds_dgemma.model.lora import Factor, FreshAdapters, Target, choose_targets
from ds_dgemma.model.spec import read_spec

REVISION = "refs/pr/3"


def write_random_adapter(folder: Path, model: Path, **settings) -> tuple[tuple[Target, ...], LoraSection, ReadFactor]:
    """Write an adapter of rank 4 for a model; its targets, settings, and factors."""
    lora = LoraSection(r=4, lora_alpha=6, init_lora_weights=False, **settings)
    stack = build_stack(read_spec(str(model)))
    targets = choose_targets(stack, lora)
    fresh = FreshAdapters(targets, lora, seed=5)

    def read(target: Target, factor: Factor) -> Tensor:
        shape = target.shape(factor, lora.r)
        return fresh.values(f"{target.name}.{factor}", 0, prod(shape)).view(shape)

    folder.mkdir(exist_ok=True)
    write_adapter(folder, targets, lora, read, str(model), REVISION, torch.float32)
    return targets, lora, read
