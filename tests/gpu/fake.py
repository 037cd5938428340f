"""A layer's operations at the released model's shapes on CUDA devices that don't exist, in bf16: no GPU is needed.

    python -m tests.gpu.fake

Under FakeTensorMode every operation checks and computes shapes, types and devices as it would on a GPU, and computes
nothing. What it does not check, and a kernel does when it is too late, `Strict` checks: type, head size, alignment and
strides of whatever reaches attention and the grouped matrix products. Autograd asks for a device that is there,
in CPU builds of torch and in CUDA builds (2.13.0+cu130: "hasPrimaryContext expects a valid device index"), so forward
passes run without gradients, and the backward passes of attention and of the grouped products are called by themselves.

Sources of the rules: as `ds_dgemma/model/kernels.py` has them; for `_grouped_mm` torch's `_meta_registrations.py`.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.moe import ep_kernels
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ds_dgemma.engine.expert_parallel import place_experts
from ds_dgemma.model import attention
from ds_dgemma.model.build import build_stack
from ds_dgemma.model.kernel_choice import torchs_own
from ds_dgemma.model.kernels import HALF, LOG_BLOCK, VECTOR_BYTES, Kernel, Problem, lies_in_vectors
from ds_dgemma.model.parts import Canvas
from ds_dgemma.model.stack import DiffusionGemmaStack
from ds_dgemma.model.sweep import Calls, Places, make_calls
from tests.gpu import shapes

ATEN: Any = torch.ops.aten
HOPPER = (9, 0)


class Refused(AssertionError):
    """What a kernel would refuse, or read wrongly without a word."""


class Strict(TorchDispatchMode):
    """Holds arguments against what the kernels ask of them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}  # checked calls by operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if check := CHECKS.get(name):
            given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
            check(name, {**given, **(kwargs or {})})
            self.seen[name] = self.seen.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def require(holds: bool, name: str, what: str) -> None:
    """One rule."""
    if not holds:
        raise Refused(f"{name}: {what}")


def check_flash(name: str, given: dict[str, Any]) -> None:
    """`_scaled_dot_product_flash_attention`, and its backward pass."""
    check_inputs(name, given)
    query, key = given["query"], given["key"]
    size = query.shape[-1]
    require(query.dtype in HALF, name, f"{query.dtype} is not 16 bits")
    require(size <= 256 and size % 8 == 0, name, f"head size {size}, at most 256 and a multiple of 8 is taken")
    require(query.shape[1] % key.shape[1] == 0, name, "query heads are no multiple of key heads")
    if (log := given.get("logsumexp")) is not None:
        require(log.dtype is torch.float32, name, f"normalisers in {log.dtype}")
        require(tuple(log.shape) == tuple(query.shape[:3]), name, f"normalisers of shape {tuple(log.shape)}")
        require(log.is_contiguous(), name, f"normalisers with strides {log.stride()} are read as if contiguous")


def check_efficient(name: str, given: dict[str, Any]) -> None:
    """`_scaled_dot_product_efficient_attention`, and its backward pass."""
    check_inputs(name, given)
    query, key = given["query"], given["key"]
    require(query.dtype in (*HALF, torch.float32), name, f"{query.dtype} has no kernel")
    require(query.shape[1] == key.shape[1], name, f"{query.shape[1]} query heads on {key.shape[1]} key heads")
    if (log := given.get("logsumexp")) is not None:
        blocks = -(-query.shape[2] // LOG_BLOCK) * LOG_BLOCK
        require(log.dtype is torch.float32, name, f"normalisers in {log.dtype}")
        require(log.shape[2] == blocks and log.stride(2) == 1, name, f"normalisers for {log.shape[2]}, not {blocks}")
        require(log.stride(0) % 8 == 0 and log.stride(1) % 8 == 0, name, f"normalisers with strides {log.stride()}")
        require(given["out"].transpose(1, 2).is_contiguous(), name, "an output that is not contiguous as [b, T, h, d]")


def check_inputs(name: str, given: dict[str, Any]) -> None:
    """What all of torch's kernels ask."""
    query, key, value = given["query"], given["key"], given["value"]
    for which in ("query", "key", "value", "grad_out", "grad_out_", "out"):
        tensor = given.get(which)
        if tensor is None:
            continue
        require(tensor.device.type == "cuda", name, f"{which} is on {tensor.device}")
        require(tensor.dtype is query.dtype, name, f"{which} is {tensor.dtype} beside {query.dtype}")
        require(tensor.dim() == 4 and tensor.numel() > 0, name, f"{which} has shape {tuple(tensor.shape)}")
        where = f"{which} with strides {tensor.stride()} from {tensor.storage_offset()}"
        require(lies_in_vectors(tensor), name, f"{where}: heads must begin at multiples of {VECTOR_BYTES} bytes")
        like = query if which in ("query", "grad_out", "grad_out_", "out") else key
        require(tensor.shape == like.shape, name, f"{which} has shape {tuple(tensor.shape)}")
    require(key.shape == value.shape and query.shape[0] == key.shape[0], name, "shapes that differ")
    require(query.shape[-1] == key.shape[-1], name, "head sizes that differ")
    if given.get("is_causal"):
        require(
            query.shape[2] == key.shape[2], name, "causal with more keys than queries: kernels differ in what it means"
        )


def check_grouped(name: str, given: dict[str, Any]) -> None:
    """`_grouped_mm`: rows of tokens on one matrix per expert."""
    for which in ("self", "mat2"):
        tensor = given[which]
        require(tensor.dtype is torch.bfloat16, name, f"{which} is {tensor.dtype}")
        lanes = VECTOR_BYTES // tensor.element_size()
        require(tensor.storage_offset() % lanes == 0, name, f"{which} does not begin at a multiple of 16 bytes")
        inner = [step for step in tensor.stride()[-2:] if step != 1]
        require(
            len(inner) < 2 and all(step % lanes == 0 for step in inner), name, f"{which}: strides {tensor.stride()}"
        )
    require(given["offs"] is not None and given["offs"].dtype is torch.int32, name, "offsets are not int32")


CHECKS: dict[str, Callable[[str, dict[str, Any]], None]] = {
    "_scaled_dot_product_flash_attention": check_flash,
    "_scaled_dot_product_flash_attention_backward": check_flash,
    "_scaled_dot_product_efficient_attention": check_efficient,
    "_scaled_dot_product_efficient_attention_backward": check_efficient,
    "_grouped_mm": check_grouped,
}


class Unguarded(TorchFunctionMode):
    """Calls operations themselves where Python's binding looks for the device first, which a CPU build cannot."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return taken(*args)
        if func is Tensor.__setitem__:
            tensor, index, value = args
            parts = index if isinstance(index, tuple) else (index,)
            whole = [part if isinstance(part, Tensor) else None for part in parts]
            if any(part is not None for part in whole):
                return ATEN.index_put_.default(tensor, whole, value)
            return ATEN.copy_.default(taken(tensor, index), value)
        if func is Tensor.contiguous:
            given = args[0]
            return given if given.is_contiguous() else ATEN.clone.default(given, memory_format=torch.contiguous_format)
        if func is Tensor.copy_:
            return ATEN.copy_.default(*args)
        return func(*args, **(kwargs or {}))


def taken(tensor: Tensor, index: Any) -> Tensor:
    """`tensor[index]`."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, Tensor) for part in parts):
        whole = [part if isinstance(part, Tensor) else None for part in parts]
        assert all(isinstance(part, Tensor) or part == slice(None) for part in parts)
        return ATEN.index.Tensor(tensor, whole)
    if Ellipsis in parts:
        at, missing = parts.index(Ellipsis), tensor.dim() - sum(part is not None for part in parts) + 1
        parts = (*parts[:at], *([slice(None)] * missing), *parts[at + 1 :])
    dim = 0
    for part in parts:
        if part is None:
            tensor, dim = ATEN.unsqueeze.default(tensor, dim), dim + 1
        elif isinstance(part, slice):
            if part != slice(None):
                tensor = ATEN.slice.Tensor(tensor, dim, part.start, part.stop, part.step or 1)
            dim += 1
        else:
            tensor = ATEN.select.int(tensor, dim, part)
    return tensor


@contextmanager
def hopper(capability: tuple[int, int] = HOPPER) -> Iterator[Strict]:
    """Fake CUDA devices, and torch's own kernels as they are taken on `capability`."""

    def kernel_for(wanted: str, query: Tensor, key: Tensor) -> Kernel:
        heads, size = query.shape[1:]
        return torchs_own(Problem(query.device, capability, query.dtype, heads, key.shape[1], size))

    def fill_indices(counts: Tensor, *_: Any) -> Tensor:  # a Triton kernel; the last argument is the length
        return torch.empty(_[-1], dtype=torch.int32, device=counts.device)

    before = attention.kernel_for, ep_kernels.fill_indices_wrapper, ep_kernels.permute_rows_supported
    attention.kernel_for, ep_kernels.fill_indices_wrapper = kernel_for, fill_indices
    ep_kernels.permute_rows_supported = lambda rows: False  # Triton again: the same by torch's operations
    try:
        with torch.no_grad(), FakeTensorMode(), Strict() as strict, Unguarded():
            yield strict
    finally:
        attention.kernel_for, ep_kernels.fill_indices_wrapper, ep_kernels.permute_rows_supported = before


def outline() -> DiffusionGemmaStack:
    """A sliding and a full layer of the released shapes, experts by grouped matrix products, on meta."""
    stack = build_stack(shapes.config(False, layers=2))
    place_experts(stack, 1, 0, True)
    return stack


def to_fake(stack: DiffusionGemmaStack) -> None:
    """Weights and buffers on a fake device."""
    for module in stack.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
        if hasattr(module, "tokens_per_expert"):
            module.tokens_per_expert = torch.empty(module.tokens_per_expert.shape, device="cuda")


def calls_of(stack: DiffusionGemmaStack) -> Calls:
    """Four documents of 1,525 clean tokens, over a window and no multiple of anything; one canvas each, two of them
    guessed, one without a clean token before it.
    """
    canvases = [Canvas(document, start) for document, start in enumerate((1269, 1269, 0, 37))]
    places = Places.on("cuda", (1525,) * 4, canvases, 256, guessed=(0, 3))
    return make_calls(stack, places, False, torch.empty(1, dtype=torch.bfloat16, device="cuda"))


def attend_backward(stack: DiffusionGemmaStack, calls: Calls, number: int) -> None:
    """Attention's backward pass over all tokens of a layer."""
    text = stack.config.get_text_config()
    own, kind = text.per_layer_config[number], stack.layer_types[number]
    tokens = calls.all.tokens
    count = tokens.clean_total + len(tokens.canvases) * tokens.length

    def some(heads: int, *size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(count, heads, *size, dtype=dtype, device="cuda")

    query, out, grad = (some(own.num_attention_heads, own.head_dim) for _ in range(3))
    key, value = (some(own.num_key_value_heads, own.head_dim) for _ in range(2))
    todo = attention.plan(tokens, stack.window if kind == "sliding_attention" else None)
    saved = (query, key, value, out, some(own.num_attention_heads, dtype=torch.float32))
    context = SimpleNamespace(
        kernel=attention.kernel_for("auto", query, key), todo=todo, scale=1.0, saved_tensors=saved
    )
    grads = attention._Attend.backward(context, grad)[4:]
    assert [tuple(found.shape) for found in grads] == [tuple(tensor.shape) for tensor in (query, key, value)]


def grouped_backward(stack: DiffusionGemmaStack, tokens: int) -> None:
    """What autograd makes of the experts' grouped matrix products: gradients of their rows, and of their weights."""
    text = stack.config.get_text_config()
    hidden, inner, experts = text.hidden_size, text.moe_intermediate_size, text.num_experts
    rows = tokens * text.top_k_experts + 8 * experts  # every group is padded to a multiple of 8
    ends = torch.empty(experts, dtype=torch.int32, device="cuda")

    def some(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="cuda")

    for width_in, width_out in ((hidden, inner), (inner, hidden)):
        weights, inputs, grad = some(experts, width_out, width_in), some(rows, width_in), some(rows, width_out)
        assert torch._grouped_mm(grad, weights, offs=ends).shape == inputs.shape
        assert torch._grouped_mm(grad.t(), inputs, offs=ends).shape == weights.shape


def check(capability: tuple[int, int] = HOPPER) -> dict[str, int]:
    """Every call of both layers; returns how often each operation was held against its rules.

    Raises:
        Refused: an operation would not run on a GPU.
    """
    stack = outline()
    with hopper(capability) as strict:
        to_fake(stack)
        calls, hidden = calls_of(stack), stack.config.get_text_config().hidden_size
        for number, layer in enumerate(stack.sweep_layers()):
            window = stack.window if layer.kind == "sliding_attention" else None
            for call in (calls.clean_and_guesses, calls.all):
                tokens = call.tokens
                count = tokens.clean_total + len(tokens.canvases) * tokens.length
                done = layer.block(torch.empty(1, count, hidden, dtype=torch.bfloat16, device="cuda"), call)
                assert (done.hidden_1NH.dtype, done.hidden_1NH.shape[1]) == (torch.bfloat16, count)
                kept = attention.keep(done.attended, tokens, calls.canvases.tokens.canvases, window)
            count = len(calls.canvases.tokens.canvases) * calls.canvases.tokens.length
            canvases = torch.empty(1, count, hidden, dtype=torch.bfloat16, device="cuda")
            layer.block(canvases, calls.canvases, kept=kept)
            attend_backward(stack, calls, number)
        grouped_backward(stack, 4 * (1525 + 256))
    return strict.seen


def main() -> int:
    """Say what was held against its rules."""
    seen = check()
    print("FIGURE on fake CUDA devices: " + ", ".join(f"{count} x {name}" for name, count in sorted(seen.items())))
    return int(seen.keys() != CHECKS.keys())


if __name__ == "__main__":
    sys.exit(main())
