"""Low-rank adapters: which weights get one, what it computes, what it starts from.

    y = W x + scaling * B A x       W frozen, A [r, in], B [out, r]; for experts a pair each, [E, r, in], [E, out, r]

Names, patterns and scaling are PEFT's (0.21: `tuners/lora/layer.py`, `tuners_utils.check_target_module_exists`). The
sweep has one set of weights for encoder and decoder, so an adapter serves both; a pattern may use the name of either.
Parameters are named `<weight>.lora_A` and `.lora_B`.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_dgemma.config.run import ATTENTION_AND_MLP, LoraSection
from ds_dgemma.errors import did_you_mean, one_line_each
from ds_dgemma.model.dropout import PartDropout
from ds_dgemma.model.spec import DECODER, ENCODER, text_spec
from ds_dgemma.model.stack import DiffusionGemmaStack

Factor = Literal["lora_A", "lora_B"]
FACTORS: tuple[Factor, Factor] = ("lora_A", "lora_B")
PREFIXES = (DECODER, ENCODER)
EXPERT_TENSORS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Target:
    """A weight that gets an adapter."""

    name: str  # as in the checkpoint below `model.decoder.`: layers.0.self_attn.q_proj, layers.0.experts.down_proj
    inputs: int
    outputs: int
    experts: int = 0  # of the whole model; 0: a plain linear

    def shape(self, factor: Factor, r: int) -> tuple[int, ...]:
        """The shape of a factor, all experts in front."""
        matrix = (r, self.inputs) if factor == "lora_A" else (self.outputs, r)
        return (self.experts, *matrix) if self.experts else matrix


def choose_targets(stack: DiffusionGemmaStack, lora: LoraSection) -> tuple[Target, ...]:
    """The weights that get an adapter, in the order of the model.

    Raises:
        UserError: a pattern that matches nothing, or nothing is left to adapt.
    """
    targets = possible_targets(stack)
    linears = {name: target for name, target in targets.items() if not target.experts}
    experts = {name: target for name, target in targets.items() if target.experts}
    problems: list[str] = []
    if lora.target_modules == "all-linear":
        chosen = set(linears)
    else:
        default = lora.target_modules == ATTENTION_AND_MLP  # a model of full layers has no v_proj
        chosen = _matched("target_modules", lora.target_modules, linears, experts, [] if default else problems)
    chosen -= _matched("exclude_modules", lora.exclude_modules, linears, experts, problems)
    chosen |= _matched("target_parameters", lora.target_parameters, experts, linears, problems)
    if not chosen and not problems:
        problems.append("lora  every weight that it targets is excluded again: nothing would be trained.")
    if problems:
        raise one_line_each("the run config", problems)
    return tuple(target for name, target in targets.items() if name in chosen)


def check_continues(
    lora: LoraSection, targets: Iterable[Target], before: LoraSection, adapted: Iterable[Target]
) -> None:
    """Raise `UserError` with every difference between a run's adapters and those of `lora.path`, which it is to
    continue: their settings `before`, and the weights that were `adapted`.
    """
    problems = [
        f"lora.{key} = {getattr(lora, key)}, but it was made with {getattr(before, key)}. Set that."
        for key in ("r", "lora_alpha", "use_rslora")
        if getattr(lora, key) != getattr(before, key)
    ]
    wanted, there = {target.name for target in targets}, {target.name for target in adapted}
    for names, what in (
        (wanted - there, "is adapted by this run only"),
        (there - wanted, "is adapted by it only"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            problems.append(f"{min(names)}{more} {what}. Set lora.target_modules and target_parameters to fit.")
    if problems:
        raise one_line_each(f"lora.path: {lora.path}", problems)


def possible_targets(stack: DiffusionGemmaStack) -> dict[str, Target]:
    """Every weight that can have an adapter, by name: the linears, then the experts' two tensors of every layer."""
    targets = [
        Target(name, module.in_features, module.out_features)
        for name, module in stack.named_modules()
        if isinstance(module, nn.Linear)
    ]
    text = text_spec(stack.config)
    hidden, inner = text.hidden_size, text.moe_intermediate_size
    for layer in range(len(stack.layer_types)):
        targets.append(Target(f"layers.{layer}.experts.gate_up_proj", hidden, 2 * inner, text.num_experts))
        targets.append(Target(f"layers.{layer}.experts.down_proj", inner, hidden, text.num_experts))
    return {target.name: target for target in targets}


def _matched(
    key: str,
    pattern: tuple[str, ...] | str | None,
    names: Iterable[str],
    others: Iterable[str],
    problems: list[str],
) -> set[str]:
    """What PEFT's kind of pattern picks of `names`; an expression or ending that picks none is a problem."""
    found: set[str] = set()
    for part in (pattern,) if isinstance(pattern, str) else pattern or ():
        alone = part if isinstance(pattern, str) else (part,)
        picked = {name for name in names if _fits(alone, name)}
        if not picked:
            problems.append(f"lora.{key}  {part!r} matches no {_kind(key)} of this model.{_hint(part, names, others)}")
        found |= picked
    return found


def is_named(pattern: tuple[str, ...] | str | None, name: str) -> bool:
    """Whether PEFT's kind of pattern, an expression for whole names or a list of endings, names a module."""
    if isinstance(pattern, str):
        return bool(re.fullmatch(pattern, name))
    return any(name == ending or name.endswith(f".{ending}") for ending in pattern or ())


def _fits(pattern: tuple[str, ...] | str, name: str) -> bool:
    return any(is_named(pattern, prefix + name) for prefix in PREFIXES)


def _kind(key: str) -> str:
    return "tensor of the experts" if key == "target_parameters" else "linear"


def _hint(part: str, names: Iterable[str], others: Iterable[str]) -> str:
    if any(_fits((part,), other) for other in others):
        right = "target_parameters" if "experts" in part or part in EXPERT_TENSORS else "target_modules"
        return f" It belongs in lora.{right}."
    endings = sorted({re.sub(r"^layers\.\d+\.", "", name) for name in names})
    return did_you_mean(part, [*endings, *(ending.rpartition(".")[2] for ending in endings)]) or (
        f" There are {', '.join(endings) or 'none'}."
    )


class Adapter(nn.Module):
    """One pair of factors, or one for each of `experts` experts that this rank holds."""

    def __init__(self, target: Target, lora: LoraSection, experts: int = 0) -> None:
        super().__init__()
        leading = (experts,) if target.experts else ()
        self.lora_A = nn.Parameter(torch.empty(*leading, lora.r, target.inputs))
        self.lora_B = nn.Parameter(torch.empty(*leading, target.outputs, lora.r))
        self.scaling = scaling(lora)

    def forward(self, inputs: Tensor, product: Callable[[Tensor, Tensor], Tensor] = F.linear) -> Tensor:
        """Return scaling * B A x; `product` multiplies with a weight [out, in], or each expert's rows with its own."""
        return product(product(inputs, self.lora_A), self.lora_B) * self.scaling


class LoraLinear(Adapter):
    """A frozen linear, its weight named as before, with its adapter."""

    def __init__(self, linear: nn.Linear, target: Target, lora: LoraSection, dropout: PartDropout) -> None:
        super().__init__(target, lora)
        self.weight, self.bias = linear.weight, linear.bias
        self._p, self._dropout, self._key = lora.lora_dropout, dropout, _hash(f"dropout {target.name}")

    def forward(self, inputs: Tensor) -> Tensor:  # type: ignore[override]
        adapted = self._dropout(inputs, self._p, self._key) if self._p and self.training else inputs
        return F.linear(inputs, self.weight, self.bias) + super().forward(adapted)


def scaling(lora: LoraSection) -> float:
    """What B A is multiplied with."""
    return lora.lora_alpha / (math.sqrt(lora.r) if lora.use_rslora else lora.r)


def adapt_linears(stack: DiffusionGemmaStack, targets: Iterable[Target], lora: LoraSection) -> None:
    """Put adapters, on meta, around the targeted linears; experts are their owner's to adapt."""
    stack.has_dropout = lora.lora_dropout > 0
    for target in targets:
        if target.experts:
            continue
        owner, _, leaf = target.name.rpartition(".")
        linear = stack.get_submodule(target.name)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{target.name} is a {type(linear).__name__}, no linear")
        with torch.device("meta"):
            setattr(stack.get_submodule(owner), leaf, LoraLinear(linear, target, lora, stack.dropout))


class FreshAdapters:
    """What new adapters start from: drawn by seed, name and expert, so that every topology starts from the same."""

    def __init__(self, targets: Iterable[Target], lora: LoraSection, seed: int) -> None:
        self._targets = {target.name: target for target in targets}
        self._lora = lora
        self._seed = seed

    def values(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened factor `name`, all experts in front; fp32."""
        weight, _, factor = name.rpartition(".")
        target = self._targets[weight]
        if factor == "lora_B" and self._lora.init_lora_weights is not False:
            return torch.zeros(stop - start)
        shape = target.shape("lora_A" if factor == "lora_A" else "lora_B", self._lora.r)[-2:]
        size = math.prod(shape)
        first, last = start // size, -(-stop // size)
        drawn = [self._matrix(f"{name} {expert}", shape).flatten() for expert in range(first, last)]
        return torch.cat([torch.empty(0), *drawn])[start - first * size : stop - first * size]

    def _matrix(self, key: str, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(_hash(f"lora {self._seed} {key}"))
        if self._lora.init_lora_weights == "gaussian":
            return torch.randn(shape, generator=generator) / self._lora.r
        bound = shape[-1] ** -0.5  # Kaiming's with a = sqrt(5), as torch fills a linear
        return (2 * torch.rand(shape, generator=generator) - 1) * bound


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Let a step's dropout depend on no step before it: a resumed run drops what an undisturbed one does."""
    torch.manual_seed(_hash(f"dropout {seed} {step} {rank}"))


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
