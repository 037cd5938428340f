"""Which attention kernel runs for each layer type: the real head sizes and our masks, forward and backward in bf16.

    python -m tests.gpu.attention [--rehearse]

The stack itself runs, one layer at a time, under the profiler; attention does not depend on the number of experts or
the vocabulary, so those are small. A sweep of even and one of odd length: some kernels ask for aligned rows. The math
fallback stores every score and must not run.
"""

import argparse
import re
import sys
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ds_dgemma.model.build import build_stack
from ds_dgemma.model.stack import DiffusionGemmaStack
from tests.gpu import shapes
from tests.reference.masks import clean_and_canvases

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


def profiled(stack: DiffusionGemmaStack, clean: int, canvas: int, rows: int) -> list:
    """Events of one forward and backward, after one that is dropped."""
    where = next(stack.parameters()).device
    valid = torch.ones(rows, clean, dtype=torch.bool, device=where)
    start = torch.full((rows, 1), clean - canvas, device=where)
    layout = clean_and_canvases(valid, start, canvas)
    hidden = stack.config.get_text_config().hidden_size
    inputs = torch.randn(rows, clean + canvas, hidden, device=where, dtype=torch.bfloat16, requires_grad=True)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if where.type == "cuda" else [])]
    stack(inputs, layout).sum().backward()
    with profile(activities=activities) as events:
        stack(inputs, layout).sum().backward()
        if where.type == "cuda":
            torch.cuda.synchronize()
    return list(events.key_averages())


def main() -> int:
    """Name what ran; 1 when it was the math fallback, or nothing known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true")
    rehearse = parser.parse_args().rehearse
    torch.manual_seed(0)
    stack, (clean, canvas, rows) = open_stack(rehearse), shapes.lengths(rehearse)
    figures, failed = [], False
    for layer, kind in zip(list(stack.layers), list(stack.layer_types), strict=True):
        stack.layers, stack.layer_types = nn.ModuleList([layer]), (kind,)
        for length in (clean, clean - 21):
            events = profiled(stack, length, canvas, rows)
            found = {m[1] or m[2] for e in events if (m := OPERATOR.search(e.key))}
            kernels = [e for e in events if e.device_type == DeviceType.CUDA and KERNEL.search(e.key)]
            kernels.sort(key=lambda event: event.self_device_time_total, reverse=True)
            failed |= MATH in found or not found
            shown = ", ".join(sorted(name for name in found if not name.endswith("_backward"))) or "nothing known"
            if kernels:
                spent = sum(event.self_device_time_total for event in kernels) / 1e3
                names = " + ".join(f"`{event.key.split('(')[0][:70]}`" for event in kernels[:2])
                shown += f" ({names}; {spent:.2f} ms)"
            figures.append(f"{kind}, {rows} x {length + canvas}: {shown}")
    print(f"FIGURE {'; '.join(figures)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
