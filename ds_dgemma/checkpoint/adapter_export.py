"""Write an adapter directory for PEFT: every factor under the encoder's and the decoder's name (`adapter.py` says why
and in which layout).
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from ds_dgemma.checkpoint.adapter import CONFIG, PEFT, TENSORS, prefixes, to_peft
from ds_dgemma.checkpoint.merge import ReadFactor
from ds_dgemma.config.run import LoraSection
from ds_dgemma.model.lora import FACTORS, PREFIXES, Target


def write_adapter(
    out: Path,
    targets: tuple[Target, ...],
    lora: LoraSection,
    read: ReadFactor,
    base: str,
    revision: str | None,
    dtype: torch.dtype,
) -> None:
    """Write the two files of an adapter into the directory `out`; `base` and `revision` say which model it is for."""
    content = {key: value.to(dtype).contiguous() for key, value in _tensors(targets, read)}
    save_file(content, out / TENSORS, metadata={"format": "pt"})
    (out / CONFIG).write_text(json.dumps(_settings(targets, lora, base, revision), indent=2, sort_keys=True) + "\n")


def _tensors(targets: tuple[Target, ...], read: ReadFactor) -> Iterator[tuple[str, Tensor]]:
    adapted = {target.name for target in targets}
    for target in targets:
        module, _, tensor = target.name.rpartition(".")
        if not target.experts:
            module = target.name
        elif tensor == "gate_up_proj" and f"{module}.down_proj" in adapted:
            module += ".base_layer"
        for factor in FACTORS:
            value = read(target, factor)
            stored = to_peft(value, factor) if target.experts else value
            for prefix in prefixes(target):
                yield f"{PEFT}{prefix}{module}.{factor}.weight", stored.clone()  # safetensors shares no memory


def _settings(targets: tuple[Target, ...], lora: LoraSection, base: str, revision: str | None) -> dict[str, Any]:
    """adapter_config.json; the targets are the weights that have factors, spelt out."""
    alpha = int(lora.lora_alpha) if lora.lora_alpha == int(lora.lora_alpha) else lora.lora_alpha
    linears = [target.name for target in targets if not target.experts]
    experts = [target.name for target in targets if target.experts]
    config = LoraConfig(
        base_model_name_or_path=base,
        revision=revision,
        inference_mode=True,
        r=lora.r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides by r, whatever it is
        lora_dropout=lora.lora_dropout,
        use_rslora=lora.use_rslora,
        init_lora_weights=lora.init_lora_weights,
        target_modules=_expression(linears),
        target_parameters=[prefix + name for name in experts for prefix in PREFIXES],
    )
    config.auto_mapping = {
        "base_model_class": "DiffusionGemmaForBlockDiffusion",
        "parent_library": "transformers.models.diffusion_gemma.modeling_diffusion_gemma",
    }
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


def _expression(names: Iterable[str]) -> str | list[str]:
    """A regular expression for exactly these linears, in encoder and decoder; an ending alone would hit the vision
    tower, which has linears of another kind.
    """
    layers: dict[str, list[str]] = {}
    others = []
    for name in names:
        if match := re.fullmatch(r"layers\.(\d+)\.(.+)", name):
            layers.setdefault(match[2], []).append(match[1])
        else:
            others.append(re.escape(name))
    by_layers: dict[str, list[str]] = {}
    for ending, numbers in layers.items():
        by_layers.setdefault("|".join(numbers), []).append(re.escape(ending))
    parts = [rf"layers\.(?:{numbers})\.(?:{'|'.join(endings)})" for numbers, endings in by_layers.items()]
    return rf"model\.(?:decoder|encoder\.language_model)\.(?:{'|'.join([*parts, *others])})" if parts + others else []
