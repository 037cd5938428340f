"""Attention kernels: a rectangle or a causal square of attention without a mask, forward with its normaliser, and
backward for a normaliser and an output that are given. `kernel_choice.py` takes one.

    sdpa             torch's own: on the CPU one; on CUDA flash (16 bits, head size to 256) or memory-efficient (any)
    flash_attn_4     PyPI flash-attn-4: 16 bits, head size to 256, Hopper and Blackwell
    ffpa             PyPI ffpa-attn: 16 bits, head size 512, Hopper and Blackwell

Shapes: b rows, h heads (g of keys and values), T queries, U keys, d head size. Normalisers are natural logarithms in
all of them. What each asks of its tensors was read in torch 2.13's `flash_attn/flash_api.cpp`, `attention_backward.cu`
and `mem_eff_attention/kernel_backward.h`, flash-attn-4 4.0.0b36's `cute/interface.py`, ffpa-attn 0.2.4's
`cute/__init__.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_ATEN: Any = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
# The memory-efficient kernel has normalisers for multiples of so many queries (`kAlignLSE`)
LOG_BLOCK = 32
VECTOR_BYTES = 16  # kernels load so many at once

Grads = tuple[Tensor, Tensor, Tensor]


class Problem(NamedTuple):
    """What decides whether a kernel fits."""

    device: torch.device
    capability: tuple[int, int] | None  # of a CUDA device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_size: int


@dataclass(frozen=True)
class Kernel:
    """One way to compute it."""

    name: str
    # query [b, h, T, d], key, value [b, g, U, d], causal (then T = U), scale -> output, normaliser [b, h, T]
    forward: Callable[..., tuple[Tensor, Tensor]]
    # gradient of the output, query, key, value, output, normaliser, causal, scale -> gradients of query, key, value
    backward: Callable[..., Grads]


def _cpu_forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return _ATEN._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)


def _cpu_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log: Tensor, causal: bool, scale: float
) -> Grads:
    backward = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(grad, query, key, value, out, log, 0.0, causal, scale=scale)


def _flash_forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    inputs = [in_vectors(_padded(tensor)) for tensor in (query, key, value)]
    out, log, *_ = _ATEN._scaled_dot_product_flash_attention(*inputs, 0.0, causal, False, scale=scale)
    return out.narrow(-1, 0, query.shape[-1]), log


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log: Tensor, causal: bool, scale: float
) -> Grads:
    size = query.shape[-1]
    grad, query, key, value, out = (in_vectors(_padded(tensor)) for tensor in (grad, query, key, value, out))
    # No packed sequences (cum_seq_q, cum_seq_k), and no dropout, whose state is not looked at then
    seed = offset = torch.empty(0, dtype=torch.uint64, device=query.device)
    found = _ATEN._scaled_dot_product_flash_attention_backward(
        grad,
        query,
        key,
        value,
        out,
        log.contiguous(),  # the kernel takes its strides for granted
        None,
        None,
        query.shape[2],
        key.shape[2],
        0.0,
        causal,
        seed,
        offset,
        scale=scale,
    )
    d_query, d_key, d_value = (tensor.narrow(-1, 0, size) for tensor in found)
    return d_query, d_key, d_value


def _efficient_forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    heads, tokens, size = query.shape[1:]
    inputs = [in_vectors(_expanded(_padded(tensor), heads)) for tensor in (query, key, value)]
    out, log, *_ = _ATEN._scaled_dot_product_efficient_attention(*inputs, None, True, 0.0, causal, scale=scale)
    return out.narrow(-1, 0, size), log.narrow(-1, 0, tokens)


def _efficient_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log: Tensor, causal: bool, scale: float
) -> Grads:
    heads, kv_heads, size = query.shape[1], key.shape[1], query.shape[-1]
    grad, query, key, value, out = (_padded(tensor) for tensor in (grad, query, key, value, out))
    key, value = _expanded(key, heads), _expanded(value, heads)
    seed = offset = torch.empty((), dtype=torch.int64, device=query.device)  # of dropout: not looked at
    found = _ATEN._scaled_dot_product_efficient_attention_backward(
        in_vectors(grad),
        in_vectors(query),
        in_vectors(key),
        in_vectors(value),
        None,
        _tokens_first(out).transpose(1, 2),  # the kernel takes a token's stride for granted: heads * head size
        _whole_blocks(log),
        seed,
        offset,
        0.0,
        [True, True, True, False],
        causal,
        scale=scale,
    )
    d_query, d_key, d_value = (tensor.narrow(-1, 0, size) for tensor in found[:3])
    return d_query, _summed(d_key, kv_heads), _summed(d_value, kv_heads)


def _padded(tensor: Tensor) -> Tensor:
    """Zeros behind each head, up to a multiple of 8: they change no score and no output."""
    missing = -tensor.shape[-1] % 8
    return F.pad(tensor, (0, missing)) if missing else tensor


def in_vectors(tensor: Tensor) -> Tensor:
    """The tensor so that a kernel can load it, 16 bytes at a time: copied where it lies otherwise."""
    return tensor if lies_in_vectors(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def lies_in_vectors(tensor: Tensor) -> bool:
    """Whether a head's numbers are neighbours, and every head begins at a multiple of 16 bytes."""
    lanes = VECTOR_BYTES // tensor.element_size()
    steps = (step for step, size in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if size > 1)
    return tensor.stride(-1) == 1 and tensor.storage_offset() % lanes == 0 and all(step % lanes == 0 for step in steps)


def _expanded(tensor: Tensor, heads: int) -> Tensor:
    """Keys or values [b, g, U, d] for every query head, [b, h, U, d]."""
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def _summed(tensor: Tensor, kv_heads: int) -> Tensor:
    """Back from [b, h, U, d] to [b, g, U, d]."""
    return tensor if tensor.shape[1] == kv_heads else tensor.unflatten(1, (kv_heads, -1)).sum(2)


def _whole_blocks(log: Tensor) -> Tensor:
    """Normalisers for whole blocks of queries: infinity, as the forward kernel has it, for those that are none."""
    *rows, tokens = log.shape
    whole = log.new_full((*rows, tokens + -tokens % LOG_BLOCK), torch.inf)
    whole.narrow(-1, 0, tokens).copy_(log)
    return whole


def _tokens_first(tensor: Tensor) -> Tensor:
    """[b, h, T, d] as contiguous [b, T, h, d]."""
    return tensor.transpose(1, 2).contiguous()


CPU = Kernel("sdpa", _cpu_forward, _cpu_backward)
FLASH = Kernel("sdpa flash", _flash_forward, _flash_backward)
EFFICIENT = Kernel("sdpa efficient", _efficient_forward, _efficient_backward)


def flash_fits(problem: Problem) -> bool:
    """Whether torch's flash kernel takes it, backward too."""
    if problem.capability is None or problem.capability < (8, 0) or problem.dtype not in HALF:
        return False
    # Backward between 193 and 224 needs more shared memory than these have (`sdp_utils.cpp`)
    small = problem.capability[0] == 12 or (8, 6) <= problem.capability <= (8, 9)
    return problem.head_size <= 256 and not (small and 192 < problem.head_size <= 224)


def efficient_fits(problem: Problem) -> bool:
    """Whether torch's memory-efficient kernel takes it: any head size."""
    if problem.capability is None or problem.dtype not in (*HALF, torch.float32):
        return False
    return problem.capability >= ((8, 0) if problem.dtype is torch.bfloat16 else (5, 0))


@dataclass(frozen=True)
class Package:
    """Kernels that are installed by themselves."""

    name: str  # in `model.attention`
    distribution: str  # on PyPI
    extra: str  # of ours, that installs it
    needs: str  # for people
    fits: Callable[[Problem], bool]
    load: Callable[[], Kernel]


def _flash_attn_4_fits(problem: Problem) -> bool:
    if problem.capability is None or problem.dtype not in HALF or problem.head_size % 8:
        return False
    size, major = problem.head_size, problem.capability[0]
    return (major == 9 and 8 <= size <= 256) or (major == 10 and (8 <= size <= 128 or size == 256))


def _load_flash_attn_4() -> Kernel:
    # The public function differentiates its own output only; these take another output and normaliser.
    interface: Any = import_module("flash_attn.cute.interface")

    def forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        inputs = map(_tokens_first, (query, key, value))
        out, log, *_ = interface._flash_attn_fwd(*inputs, softmax_scale=scale, causal=causal, return_lse=True)
        return out.transpose(1, 2), log

    def backward(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log: Tensor, causal: bool, scale: float
    ) -> Grads:
        inputs = map(_tokens_first, (query, key, value, out, grad))
        found = interface._flash_attn_bwd(*inputs, log.contiguous(), softmax_scale=scale, causal=causal)
        d_query, d_key, d_value = (tensor.transpose(1, 2) for tensor in found[:3])
        return d_query, d_key, d_value

    return Kernel("flash_attn_4", forward, backward)


def _ffpa_fits(problem: Problem) -> bool:
    return problem.capability in ((9, 0), (10, 0)) and problem.dtype in HALF and problem.head_size == 512


def _load_ffpa() -> Kernel:
    # As above. They turn [b, h, T, d] into [b, T, h, d], which is then contiguous.
    cute: Any = import_module("ffpa_attn.cute")

    def laid_out(*tensors: Tensor) -> list[Tensor]:
        return [_tokens_first(tensor).transpose(1, 2) for tensor in tensors]

    def forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        return cute._ffpa_attn_forward_cute(*laid_out(query, key, value), scale, causal)

    def backward(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log: Tensor, causal: bool, scale: float
    ) -> Grads:
        inputs = laid_out(grad, query, key, value, out)
        return cute._ffpa_attn_backward_cute(*inputs, log.contiguous(), scale, causal)

    return Kernel("ffpa", forward, backward)


PACKAGES = (
    Package(
        "flash_attn_4", "flash-attn-4", "flash-attn-4", "bf16, head sizes to 256 (compute capability 10: to 128, and "
        "256), compute capability 9 or 10", _flash_attn_4_fits, _load_flash_attn_4,
    ),
    Package(
        "ffpa", "ffpa-attn", "ffpa", "bf16, head size 512, compute capability 9.0 or 10.0", _ffpa_fits, _load_ffpa
    ),
)  # fmt: skip
