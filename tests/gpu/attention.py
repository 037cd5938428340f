"""Attention kernels at the real head sizes in bf16: each that fits against fp32, and which one a layer runs.

    python -m tests.gpu.attention [--rehearse]

Every kernel of torch, and of a package that is installed, goes through what a package's goes through before its first
use, here against plain fp32 arithmetic. Then the layers run under the profiler, clean tokens and canvases, forward and
backward; attention does not depend on the number of experts or the vocabulary, so those are small. Rows of even and of
odd length: some kernels ask for aligned ones. The math fallback stores every score and must not run.
"""

import argparse
import re
import sys
import time
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ds_dgemma.model.build import build_stack
from ds_dgemma.model.kernel_choice import choose, disagreement, is_installed, problem_on, torchs_own
from ds_dgemma.model.kernels import EFFICIENT, PACKAGES, Kernel, Problem, efficient_fits
from ds_dgemma.model.parts import Canvas
from ds_dgemma.model.stack import DiffusionGemmaStack, SweepLayer
from ds_dgemma.model.sweep import Places, make_calls
from tests.gpu import shapes
from tests.reference.kernel import EXACT

OPERATOR = re.compile(r"aten::_(scaled_dot_product_\w+)|(flex_attention)")
KERNEL = re.compile(r"fmha|flash|attention|attn|sdpa|mem_eff", re.IGNORECASE)
MATH = "scaled_dot_product_attention_math"


def open_stack(rehearse: bool) -> DiffusionGemmaStack:
    """A sliding and a full layer with random weights in bf16."""
    small = {"num_experts": 8, "vocab_size": 512}
    stack = build_stack(shapes.config(rehearse, layers=2, **small))
    text: Any = stack.config.get_text_config()
    rotary = type(stack.rotary_emb)
    stack = stack.to_empty(device=shapes.device(rehearse)).to(torch.bfloat16)
    stack.rotary_emb = rotary(text).to(shapes.device(rehearse))  # frequencies are computed, and stay fp32
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.fill_(1) if parameter.ndim < 2 else parameter.normal_(0, parameter.shape[-1] ** -0.5)
        for layer in stack.layers:
            for buffer in layer.buffers(recurse=False):
                buffer.fill_(1)
    return stack


def problem_of(stack: DiffusionGemmaStack, number: int, where: torch.device) -> Problem:
    """A layer's attention."""
    own = stack.config.get_text_config().per_layer_config[number]
    return problem_on(where, torch.bfloat16, own.num_attention_heads, own.num_key_value_heads, own.head_dim)


def fitting(problem: Problem) -> list[Kernel]:
    """Every kernel that fits and is installed."""
    found = [torchs_own(problem)]
    if efficient_fits(problem) and EFFICIENT not in found:
        found.append(EFFICIENT)
    return found + [package.load() for package in PACKAGES if package.fits(problem) and is_installed(package)]


def milliseconds(kernel: Kernel, problem: Problem, rows: int, tokens: int) -> float:
    """A causal square, forward and backward; the mean of a few after the first."""

    def some(heads: int) -> torch.Tensor:
        flat = torch.randn(rows, tokens, heads, problem.head_size, device=problem.device, dtype=problem.dtype)
        return flat.transpose(1, 2)

    query, key, value, grad = map(some, (problem.heads, problem.kv_heads, problem.kv_heads, problem.heads))
    wait = torch.cuda.synchronize if problem.device.type == "cuda" else lambda: None
    began, repeats = 0.0, 5
    for repeat in range(repeats + 1):
        if repeat == 1:
            wait()
            began = time.perf_counter()
        out, log = kernel.forward(query, key, value, True, 1.0)
        kernel.backward(grad, query, key, value, out, log, True, 1.0)
    wait()
    return (time.perf_counter() - began) / repeats * 1e3


def profiled(stack: DiffusionGemmaStack, layer: SweepLayer, clean: int, canvas: int, rows: int) -> list:
    """Events of one forward and backward over clean tokens and canvases, after one that is dropped."""
    where = next(stack.parameters()).device
    canvases = [Canvas(document, clean - canvas) for document in range(rows)]
    places = Places.on(where, (clean,) * rows, canvases, canvas, guessed=(0,))
    hidden = stack.config.get_text_config().hidden_size
    inputs = torch.randn(1, rows * (clean + canvas), hidden, device=where, dtype=torch.bfloat16, requires_grad=True)
    call = make_calls(stack, places, False, inputs).all
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if where.type == "cuda" else [])]
    layer.block(inputs, call).hidden_1NH.sum().backward()
    with profile(activities=activities) as events:
        layer.block(inputs, call).hidden_1NH.sum().backward()
        if where.type == "cuda":
            torch.cuda.synchronize()
    return list(events.key_averages())


def main() -> int:
    """Name what ran; 1 when a kernel is wrong, the math fallback ran, or nothing known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true")
    rehearse = parser.parse_args().rehearse
    torch.manual_seed(0)
    stack, (clean, canvas, rows) = open_stack(rehearse), shapes.lengths(rehearse)
    figures, failed = [], False
    for number, layer in enumerate(stack.sweep_layers()):
        problem = problem_of(stack, number, shapes.device(rehearse))
        chosen = choose("auto", problem)
        figures += [f"{layer.kind} takes {chosen.kernel.name}", *chosen.dropped]
        for kernel in fitting(problem):
            try:
                wrong = disagreement(kernel, EXACT, problem)
                took = f"{milliseconds(kernel, problem, rows, clean):.2f} ms"
            except Exception as error:  # one that does not run is a finding, and the others go on
                wrong = took = f"{type(error).__name__}: {error}"
            failed |= wrong is not None
            figures.append(f"{kernel.name}: {wrong or f'as fp32, {took} for {rows} x {clean} causal'}")
        for length in (clean, clean - 21):
            events = profiled(stack, layer, length, canvas, rows)
            found = {m[1] or m[2] for e in events if (m := OPERATOR.search(e.key))}
            kernels = [e for e in events if e.device_type == DeviceType.CUDA and KERNEL.search(e.key)]
            kernels.sort(key=lambda event: event.self_device_time_total, reverse=True)
            failed |= MATH in found or not (found or kernels)
            shown = ", ".join(sorted(name for name in found if not name.endswith("_backward"))) or "no aten operator"
            if kernels:
                spent = sum(event.self_device_time_total for event in kernels) / 1e3
                names = " + ".join(f"`{event.key.split('(')[0][:70]}`" for event in kernels[:2])
                shown += f" ({names}; {spent:.2f} ms)"
            figures.append(f"{layer.kind}, {rows} x {length + canvas}: {shown}")
    print(f"FIGURE {'; '.join(figures)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
