"""Write an adapter directory: for PEFT, or in the per-expert form that vLLM reads.

PEFT's form has every factor under the encoder's and the decoder's name (`adapter.py` says why and in which layout).
vLLM ignores `target_parameters` without a word and reads a matrix per expert and projection instead; the model is
there once, so the decoder's names, which are the checkpoint's, are all that it is given.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from ds_dgemma.checkpoint.adapter import CONFIG, PEFT, TENSORS, prefixes, to_peft
from ds_dgemma.checkpoint.merge import ReadFactor
from ds_dgemma.config.run import LoraSection
from ds_dgemma.model.lora import FACTORS, PREFIXES, Target

AdapterFormat = Literal["peft", "vllm"]


def write_adapter(
    out: Path,
    targets: tuple[Target, ...],
    lora: LoraSection,
    read: ReadFactor,
    base: str,
    revision: str | None,
    form: AdapterFormat,
    dtype: torch.dtype,
) -> None:
    """Write the two files of an adapter into the directory `out`; `base` and `revision` say which model it is for."""
    tensors = _peft_tensors(targets, read) if form == "peft" else _vllm_tensors(targets, read)
    content = {key: value.to(dtype).contiguous() for key, value in tensors}
    save_file(content, out / TENSORS, metadata={"format": "pt"})
    (out / CONFIG).write_text(
        json.dumps(_settings(targets, lora, base, revision, form), indent=2, sort_keys=True) + "\n"
    )


def _peft_tensors(targets: tuple[Target, ...], read: ReadFactor) -> Iterator[tuple[str, Tensor]]:
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


def _vllm_tensors(targets: tuple[Target, ...], read: ReadFactor) -> Iterator[tuple[str, Tensor]]:
    for target in targets:
        A, B = read(target, "lora_A"), read(target, "lora_B")
        stem = PEFT + PREFIXES[0]
        if not target.experts:
            yield from _pair(stem + target.name, A, B)
            continue
        module, _, tensor = target.name.rpartition(".")
        for expert in range(target.experts):
            name = f"{stem}{module}.{expert}"
            if tensor == "down_proj":
                yield from _pair(f"{name}.down_proj", A[expert], B[expert])
            else:  # gate and up read through one A
                for projection, rows in zip(("gate_proj", "up_proj"), B[expert].chunk(2), strict=True):
                    yield from _pair(f"{name}.{projection}", A[expert], rows)


def _pair(name: str, A: Tensor, B: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.lora_A.weight", A.clone()
    yield f"{name}.lora_B.weight", B.clone()


def _settings(
    targets: tuple[Target, ...], lora: LoraSection, base: str, revision: str | None, form: AdapterFormat
) -> dict[str, Any]:
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
        target_modules=_expression(linears) if form == "peft" else _vllm_modules(targets),
        target_parameters=[prefix + name for name in experts for prefix in PREFIXES] if form == "peft" else None,
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


def _vllm_modules(targets: tuple[Target, ...]) -> list[str]:
    """The last names of what is adapted, as vLLM compares them."""
    names = set()
    for target in targets:
        leaf = target.name.rpartition(".")[2]
        names |= {"gate_proj", "up_proj"} if leaf == "gate_up_proj" else {leaf}
    return sorted(names)
