"""The expert layer at real shapes in bf16, a loop over experts and grouped matrix multiplication, against fp32.

    python -m tests.gpu.grouped [--rehearse]

The same tokens, routing and weights go through all three, so nothing flips: what is left is rounding, and the two bf16
results must be equally far from fp32 (relative L2 distance), in the output and in every gradient.
"""

import argparse
import copy
import sys
import time

import torch
from torch import Tensor

from ds_dgemma.engine.expert_parallel import ExpertParallelExperts, place_experts
from ds_dgemma.model.build import build_stack
from tests.gpu import shapes

LARGEST = 2e-2  # relative distance of bf16 results to fp32; rounding gives a few 1e-3
NAMES = ("output", "input gradient", "weight gradient")


def open_layer(rehearse: bool, grouped: bool) -> ExpertParallelExperts:
    """One layer's experts, one rank, fresh weights in bf16."""
    stack = build_stack(shapes.config(rehearse, layers=1))
    place_experts(stack, 1, 0, grouped)
    layer = stack.layers[0].experts
    assert isinstance(layer, ExpertParallelExperts)
    layer = layer.to_empty(device=shapes.device(rehearse)).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
        for buffer in layer.buffers():
            buffer.zero_()
    return layer


def forward_backward(layer: ExpertParallelExperts, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Run the layer; return its output and its input, which has a gradient now, as the weights have."""
    hidden, index, weights, towards = inputs
    dtype = next(layer.parameters()).dtype
    layer.zero_grad()
    hidden = hidden.to(dtype, copy=True).requires_grad_(True)  # a leaf of its own: gradients add up
    output = layer(hidden, index, weights.to(dtype))
    output.backward(towards.to(dtype))
    return output, hidden


def results(layer: ExpertParallelExperts, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Output, input gradient and all weights' gradients, in fp32."""
    output, hidden = forward_backward(layer, inputs)
    gradients = [parameter.grad.flatten() for parameter in layer.parameters() if parameter.grad is not None]
    assert hidden.grad is not None
    return output.detach().float(), hidden.grad.float(), torch.cat(gradients).float()


def distance(seen: Tensor, exact: Tensor) -> float:
    """Relative L2 distance."""
    return float((seen - exact).norm() / exact.norm())


def milliseconds(layer: ExpertParallelExperts, inputs: tuple[Tensor, ...], repeats: int = 5) -> float:
    """Forward and backward, the mean of a few after the first."""
    wait = torch.cuda.synchronize if inputs[0].is_cuda else lambda: None
    forward_backward(layer, inputs)
    wait()
    began = time.perf_counter()
    for _ in range(repeats):
        forward_backward(layer, inputs)
    wait()
    return (time.perf_counter() - began) / repeats * 1e3


def main() -> int:
    """Compare and time; 1 when grouped matrix multiplication is off by more than rounding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true")
    rehearse = parser.parse_args().rehearse
    torch.manual_seed(0)
    clean, canvas, rows = shapes.lengths(rehearse)
    text = shapes.config(rehearse, layers=1).get_text_config()
    tokens, where = rows * (clean + canvas), shapes.device(rehearse)
    weights, index = torch.randn(tokens, text.num_experts, device=where).softmax(-1).topk(text.top_k_experts)
    hidden = torch.randn(tokens, text.hidden_size, device=where).bfloat16()
    inputs = (hidden, index, weights / weights.sum(-1, keepdim=True), torch.randn_like(hidden))

    loop, grouped = open_layer(rehearse, False), open_layer(rehearse, True)
    grouped.load_state_dict(loop.state_dict())
    exact_layer = copy.deepcopy(loop).float()
    exact = results(exact_layer, inputs)
    del exact_layer
    distances = {}
    for name, layer in (("loop", loop), ("grouped", grouped)):
        distances[name] = [distance(seen, true) for seen, true in zip(results(layer, inputs), exact, strict=True)]
    figures = [
        f"{name} {a:.1e} and {b:.1e}" for name, a, b in zip(NAMES, distances["loop"], distances["grouped"], strict=True)
    ]
    took = f"{milliseconds(loop, inputs):.1f} and {milliseconds(grouped, inputs):.1f} ms"
    print(f"FIGURE loop and grouped, distance to fp32: {', '.join(figures)}; forward and backward {took}")
    pairs = zip(distances["loop"], distances["grouped"], strict=True)
    return int(not all(b <= LARGEST and b <= 1.5 * a + 1e-3 for a, b in pairs))


if __name__ == "__main__":
    sys.exit(main())
