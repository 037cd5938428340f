"""Which attention kernel computes a layer.

`auto` takes the first of `kernels.PACKAGES` that is installed and fits, else torch's own. A kernel of a package is held
against torch's on a small problem of the same kind before it is used: on one it gets wrong, it is dropped.
"""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import DiffusionGemmaConfig

from ds_dgemma.errors import UserError, first_line
from ds_dgemma.model.kernels import (
    CPU,
    EFFICIENT,
    FLASH,
    PACKAGES,
    Kernel,
    Package,
    Problem,
    efficient_fits,
    flash_fits,
)
from ds_dgemma.model.spec import text_spec

Wanted = Literal["auto", "sdpa", "flash_attn_4", "ffpa"]

LARGEST = 2e-2  # relative distance of two kernels' results in 16 bits; rounding gives a few 1e-3


class Choice(NamedTuple):
    """A kernel, and what was dropped on the way to it: a line each, for people."""

    kernel: Kernel
    dropped: tuple[str, ...] = ()


@cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def problem_on(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_size: int) -> Problem:
    """A layer's attention on a device."""
    return Problem(device, _capability(device), dtype, heads, kv_heads, head_size)


def kernel_for(wanted: Wanted, query: Tensor, key: Tensor) -> Kernel:
    """The kernel for queries [N, h, d] and keys [N, g, d]."""
    heads, head_size = query.shape[1:]
    return choose(wanted, problem_on(query.device, query.dtype, heads, key.shape[1], head_size)).kernel


def choose_kernels(
    wanted: Wanted, spec: DiffusionGemmaConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, Choice]:
    """The kernel of each of a model's layer types; see `choose_all`."""
    text = text_spec(spec)
    layers = {
        kind: problem_on(device, dtype, layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim)
        for kind, layer in zip(text.layer_types, text.per_layer_config, strict=True)
    }
    return choose_all(wanted, layers)


def choose_all(wanted: Wanted, layers: Mapping[str, Problem]) -> dict[str, Choice]:
    """The kernel of each layer type.

    Raises:
        UserError: the package that is wanted is not installed, fits no layer, or computes something else than torch.
    """
    chosen = {kind: choose(wanted, problem) for kind, problem in layers.items()}
    for package in PACKAGES:
        if package.name == wanted and not any(choice.kernel.name == wanted for choice in chosen.values()):
            reasons = [line for choice in chosen.values() for line in choice.dropped]
            raise UserError(_why_not(package, list(layers.values()), reasons))
    return chosen


def _why_not(package: Package, layers: list[Problem], reasons: list[str]) -> str:
    head = f"model.attention = {package.name}: "
    tail = " Set model.attention to auto or sdpa."
    if reasons:
        return head + reasons[0] + tail
    if all(problem.capability is None for problem in layers):
        return f"{head}it needs a CUDA device, and this run has none.{tail}"
    if not any(map(package.fits, layers)):
        found = ", ".join(
            f"head size {problem.head_size} in {str(problem.dtype).removeprefix('torch.')}" for problem in layers
        )
        capability = ".".join(map(str, layers[0].capability or ()))
        return f"{head}it needs {package.needs}; found {found}, compute capability {capability}.{tail}"
    return f"{head}{package.distribution} is not installed: pip install --editable '.[{package.extra}]'.{tail}"


@cache
def choose(wanted: Wanted, problem: Problem) -> Choice:
    """The kernel for a problem; torch's own where the package that is wanted does not serve."""
    own, dropped = torchs_own(problem), []
    for package in PACKAGES:
        if wanted not in ("auto", package.name) or not package.fits(problem) or not is_installed(package):
            continue
        try:
            kernel = package.load()
            if (wrong := disagreement(kernel, own, problem)) is None:
                return Choice(kernel, tuple(dropped))
        except Exception as error:  # a package made for another torch, driver or device fails in any way
            wrong = f"{type(error).__name__}: {first_line(error)}"
        dropped.append(f"{package.distribution} is not used at head size {problem.head_size}: {wrong}")
    return Choice(own, tuple(dropped))


def is_installed(package: Package) -> bool:
    """Whether a package is there; it is not imported, for that takes seconds and a GPU."""
    try:
        version(package.distribution)
    except PackageNotFoundError:
        return False
    return True


def torchs_own(problem: Problem) -> Kernel:
    """Torch's kernel for a problem."""
    if problem.device.type in ("cpu", "meta"):  # on meta for shapes and sizes alone
        return CPU
    if flash_fits(problem):
        return FLASH
    if efficient_fits(problem):
        return EFFICIENT
    raise NotImplementedError(f"torch has no attention kernel that gives its normaliser for {problem}")


def disagreement(kernel: Kernel, reference: Kernel, problem: Problem) -> str | None:
    """What `kernel` computes otherwise than `reference`, causally or not, forward or backward; None: nothing.

    The backward pass gets another output and normaliser than the forward pass gave, as parts do that were merged.
    """
    draw = torch.Generator(problem.device).manual_seed(0)  # not the run's: it resumes bit for bit

    def some(rows: int, tokens: int, heads: int) -> Tensor:
        flat = torch.randn(rows * tokens, heads, problem.head_size, generator=draw, device=problem.device)
        return flat.to(problem.dtype).unflatten(0, (rows, tokens)).transpose(1, 2)

    for causal, queries, keys in ((False, 200, 333), (True, 200, 200)):
        query, grad = some(2, queries, problem.heads), some(2, queries, problem.heads)
        key, value = some(2, keys, problem.kv_heads), some(2, keys, problem.kv_heads)
        scale = problem.head_size**-0.5
        results = {}
        merged_out, merged_log = None, None
        for each in (reference, kernel):
            out, log = each.forward(query, key, value, causal, scale)
            if merged_out is None or merged_log is None:
                merged_out, merged_log = (0.7 * out).to(problem.dtype), log + 0.5
            results[each] = (out, log, *each.backward(grad, query, key, value, merged_out, merged_log, causal, scale))
        names = ("output", "normaliser", "gradient of queries", "gradient of keys", "gradient of values")
        for name, seen, expected in zip(names, results[kernel], results[reference], strict=True):
            distance = float((seen.float() - expected.float()).norm() / expected.float().norm())
            if not distance <= LARGEST:  # NaN too
                return (
                    f"its {name} is off by {distance:.1e}{' causally' if causal else ''}, measured by {reference.name}"
                )
    return None
