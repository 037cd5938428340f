"""Adapters on disk, as PEFT 0.21 reads and writes them.

A directory has `adapter_config.json` and `adapter_model.safetensors`. transformers has the language model twice, as
encoder and as decoder, over the same weights, and PEFT gives each its own adapter: ours is written under both names,
equal, and a pair that differs is refused, because the shared weights cannot be two things.

Experts are PEFT's `target_parameters`. A wrapper holds all of one tensor's factors in two matrices, A [E*r, in] with
the experts' rows one after another, B [out, r*E] with the ranks' columns one after another; where both tensors of a
layer are adapted, the wrapper of `gate_up_proj` is inside that of `down_proj`, as its `base_layer`.
Source: peft 0.21.2 `tuners/lora/layer.py` (`ParamWrapper`), `tuners_utils.py` (`_inject_parameters`).
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ds_dgemma.checkpoint.load import MakeReal
from ds_dgemma.checkpoint.weights import FLOATS
from ds_dgemma.config.run import LoraSection
from ds_dgemma.errors import UserError, first_fault, first_line, one_line_each
from ds_dgemma.model.lora import FACTORS, PREFIXES, Factor, Target, is_named
from ds_dgemma.model.names import DECODER, checkpoint_name, is_adapter, is_expert
from ds_dgemma.model.stack import DiffusionGemmaStack

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
PEFT = "base_model.model."

# What a PEFT configuration may set: anything else could change what the factors mean.
_SUPPORTED = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",  # looked at below
    "ensure_weight_tying",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",  # looked at below
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",  # has a default; use_qalora is what counts
    "r",
    "revision",
    "target_modules",
    "target_parameters",
    "task_type",
    "use_rslora",
}

# Elements [start, stop) of a flattened factor, all experts in front, by its name below `model.decoder.`
AdapterValues = Callable[[str, int, int], Tensor]


def fill_adapters(
    stack: DiffusionGemmaStack, make_real: MakeReal, values: AdapterValues, *, expert_rank: int = 0
) -> None:
    """Make the adapters real, which are on meta, and fill what this rank holds of them."""
    for owner_name, owner in stack.named_modules():
        for leaf, parameter in list(owner.named_parameters(recurse=False)):
            name = f"{owner_name}.{leaf}"
            if not is_adapter(name):
                continue
            real, storage, start, stop = make_real(name, parameter)
            factor = checkpoint_name(name).removeprefix(DECODER)
            offset = expert_rank * parameter.numel() if is_expert(name) else 0
            with torch.no_grad():
                storage[: stop - start] = values(factor, offset + start, offset + stop)
                storage[stop - start :].zero_()  # ZeRO pads a tensor to equal shares
            setattr(owner, leaf, real)


class AdapterReader:
    """A PEFT adapter directory for a model with the weights `possible`; `targets` are the ones that it adapts.

    Raises:
        UserError: unreadable, not a LoRA of this kind, of another model, or unequal for encoder and decoder.
    """

    def __init__(self, directory: Path, possible: Mapping[str, Target]) -> None:
        self.directory = directory
        self.settings = _read_settings(directory)
        if not (directory / TENSORS).is_file() and (pickled := directory / PICKLED).is_file():
            raise UserError(
                f"adapter {directory} has no {TENSORS}, and {PICKLED} is pickled, which can run code when it is read: "
                f"refused. If you trust it, convert it: safetensors.torch.save_file(torch.load('{pickled}', "
                f"weights_only=True), '{directory / TENSORS}')."
            )
        self.lora = _lora_section(self.settings, directory / CONFIG)
        try:
            self._file = safe_open(directory / TENSORS, "pt")
            self._shapes = {key: tuple(self._file.get_slice(key).get_shape()) for key in self._file.keys()}  # noqa: SIM118
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"adapter {directory} cannot be read: {first_line(error)}.") from error
        if any(re.search(r"\.experts\.\d+\.", key) for key in self._shapes):
            raise UserError(f"adapter {directory} has a pair for each expert, which PEFT's form does not have.")
        if _is_for_the_decoder_only(self._shapes):
            raise UserError(
                f"adapter {directory} has factors for the decoder only: it was made without the encoder, which shares "
                "these weights. Export it again."
            )
        self._wrappers = dict(self._find(possible))
        self.targets = tuple(target for name, target in possible.items() if name in self._wrappers)
        self._check(possible.values())

    def base_warning(self, model: str) -> str | None:
        """A word on an adapter that was made for a model of another name, which may still be the same model."""
        made_for = self.settings.get("base_model_name_or_path")
        if not made_for or Path(made_for).resolve() == Path(model).resolve():
            return None
        return f"The adapter {self.directory} was made for {made_for}, here it is put on {model}."

    def read(self, target: Target, factor: Factor) -> Tensor:
        """A whole factor, experts in front."""
        stored = self._file.get_tensor(self._keys(target, factor)[0])
        return from_peft(stored, target.experts, factor) if target.experts else stored

    def values(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened factor `name`, all experts in front."""
        weight, _, factor = name.rpartition(".")
        target = next(target for target in self.targets if target.name == weight)
        return self.read(target, "lora_A" if factor == "lora_A" else "lora_B").flatten()[start:stop]

    def _find(self, possible: Mapping[str, Target]) -> Iterator[tuple[str, str]]:
        """Which module of PEFT's, below the model's prefix, holds the factors of each target that is there."""
        there = {key.removeprefix(PEFT + prefix) for key in self._shapes for prefix in PREFIXES}
        for name, target in possible.items():
            if not target.experts:
                if f"{name}.lora_A.weight" in there:
                    yield name, name
                continue
            wrapper = name.rpartition(".")[0]
            nested = f"{wrapper}.base_layer.lora_A.weight" in there
            module = f"{wrapper}.base_layer" if nested and name.endswith("gate_up_proj") else wrapper
            if nested or self._sizes(module) == (target.inputs, target.outputs):
                yield name, module

    def _sizes(self, module: str) -> tuple[int, int] | None:
        """What a wrapper's factors read and write: they tell the experts' two tensors apart. None: no such wrapper."""
        for prefix in PREFIXES:
            A, B = (self._shapes.get(f"{PEFT}{prefix}{module}.{factor}.weight") for factor in FACTORS)
            if A and B:
                return A[-1], B[0]
        return None

    def _keys(self, target: Target, factor: Factor) -> list[str]:
        module = self._wrappers[target.name]
        return [f"{PEFT}{prefix}{module}.{factor}.weight" for prefix in prefixes(target)]

    def _check(self, possible: Iterable[Target]) -> None:
        problems, known = [], set()
        for target in self.targets:
            for factor in FACTORS:
                keys = self._keys(target, factor)
                known |= set(keys)
                problems += self._factor_problems(keys, peft_shape(target, factor, self.lora.r))
        problems += [
            f"{key} is no adapter of a weight that this model has." for key in sorted(self._shapes.keys() - known)
        ]
        if not self.targets and not problems:
            problems = ["it holds no factors."]
        problems = problems or list(self._uncovered(possible))
        if problems:
            shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
            raise one_line_each(f"the adapter {self.directory}", shown)

    def _uncovered(self, possible: Iterable[Target]) -> Iterator[str]:
        """Where the settings, by which PEFT puts factors on, name other weights than those that have factors."""
        for target in possible:
            key = "target_parameters" if target.experts else "target_modules"
            named = [_names(self.lora, target, prefix) for prefix in prefixes(target)]
            if target in self.targets and not all(named):
                yield f"{target.name} has factors, but {CONFIG}'s {key} does not name it: PEFT would not read them."
            if target not in self.targets and any(named):
                yield f"{target.name} has no factors, but {CONFIG}'s {key} names it."

    def _factor_problems(self, keys: list[str], shape: tuple[int, ...]) -> Iterator[str]:
        shapes = {key: self._shapes.get(key) for key in keys}
        yield from (f"{key} is missing, shape {shape} was expected." for key in keys if shapes[key] is None)
        yield from (
            f"{key} has shape {found}, {shape} was expected of this model and rank {self.lora.r}."
            for key, found in shapes.items()
            if found not in (None, shape)
        )
        if set(shapes.values()) != {shape}:
            return
        types = {key: self._file.get_slice(key).get_dtype() for key in keys}
        if strange := {key: name for key, name in types.items() if name not in FLOATS}:
            yield from (f"{key} is {name}, one of {', '.join(FLOATS)} was expected." for key, name in strange.items())
            return
        factors = {key: self._file.get_tensor(key) for key in keys}
        broken = [key for key, factor in factors.items() if not factor.double().isfinite().all()]
        yield from (f"{key} holds NaN or infinity, numbers were expected. Take an earlier one." for key in broken)
        if not broken and len(keys) == 2 and not torch.equal(*factors.values()):
            yield (
                f"{keys[0]} and {keys[1]} differ. Encoder and decoder share their weights: one adapter, "
                "written under both names, was expected."
            )


def _is_for_the_decoder_only(keys: Iterable[str]) -> bool:
    """Whether the layers are there once and not for encoder and decoder."""
    return [any(key.startswith(f"{PEFT}{prefix}layers.") for key in keys) for prefix in PREFIXES] == [True, False]


def _names(lora: LoraSection, target: Target, prefix: str) -> bool:
    """Whether PEFT's settings name a weight in this place of the model."""
    name = prefix + target.name
    if target.experts:
        return is_named(lora.target_parameters, name)
    named = lora.target_modules == "all-linear" or is_named(lora.target_modules, name)
    return named and not is_named(lora.exclude_modules, name)


def _read_settings(directory: Path) -> dict[str, Any]:
    try:
        settings = json.loads((directory / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"adapter {directory} cannot be read: {first_line(error)}. A PEFT directory has {CONFIG} and {TENSORS}."
        ) from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise UserError(f"adapter {directory / CONFIG} is not of PEFT's type LORA.")
    used = sorted(key for key, value in settings.items() if value and key not in _SUPPORTED)
    if settings.get("bias", "none") != "none":
        used.append("bias")
    if settings.get("layers_to_transform") == 0:
        used.append("layers_to_transform")
    if not isinstance(made_for := settings.get("base_model_name_or_path"), str | None):
        raise UserError(f"adapter {directory / CONFIG}: base_model_name_or_path = {made_for!r}, a name was expected.")
    if used:
        raise UserError(f"adapter {directory} uses {', '.join(used)}: not supported here.")
    if (init := settings.get("init_lora_weights")) not in (True, False, None, "gaussian"):
        raise UserError(
            f"adapter {directory / CONFIG}: init_lora_weights = {init!r}, true, false or 'gaussian' was expected. "
            "Such an adapter may belong to a base that its start has changed. Let PEFT write it as plain LoRA: "
            "save_pretrained with path_initial_model_for_weight_conversion."
        )
    return settings


def _lora_section(settings: dict[str, Any], path: Path) -> LoraSection:
    """What the factors mean and where they go."""
    numbers = {key: settings[key] for key in ("r", "lora_alpha", "use_rslora") if key in settings}
    places = {key: settings.get(key) for key in ("target_modules", "exclude_modules")}
    try:
        return LoraSection.model_validate(
            {**numbers, **places, "target_parameters": settings.get("target_parameters") or ()}
        )
    except ValidationError as error:
        raise UserError(f"adapter {path}: {first_fault(error)}.") from error


def prefixes(target: Target) -> tuple[str, ...]:
    """The names below which transformers has this weight: decoder and encoder, but for what only the decoder has."""
    return PREFIXES if target.name.startswith("layers.") else PREFIXES[:1]


def peft_shape(target: Target, factor: Factor, r: int) -> tuple[int, ...]:
    """The shape of a factor in PEFT's file."""
    ranks = r * max(target.experts, 1)
    return (ranks, target.inputs) if factor == "lora_A" else (target.outputs, ranks)


def to_peft(value: Tensor, factor: Factor) -> Tensor:
    """Experts' factors [E, r, in] or [E, out, r] as the matrix of one wrapper."""
    if factor == "lora_A":
        return value.reshape(-1, value.shape[-1])
    return value.permute(1, 2, 0).reshape(value.shape[1], -1).contiguous()


def from_peft(value: Tensor, experts: int, factor: Factor) -> Tensor:
    """The matrix of one wrapper as experts' factors [E, r, in] or [E, out, r]."""
    if factor == "lora_A":
        return value.reshape(experts, -1, value.shape[-1])
    return value.reshape(value.shape[0], -1, experts).permute(2, 0, 1).contiguous()
