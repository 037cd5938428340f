"""Peak memory and CPU time of one step, forward and backward without optimizer, from 2,048 to 32,768 tokens.

    python -m tests.benchmarks.length [--check] [--lengths 2048 4096 ...] [--checkpointing full]

Two tiny models of six layers, one example each: all layers sliding, and five sliding to one full layer. Every length
is a process of its own; a shorter step is made first, so that what is built once is not counted. Memory is the
process's resident peak in the next step, above what it had before and as a whole; time is of one more step.

A full layer's attention has a product for every pair of tokens before one another: quadratic, by design of the model.
Its pairs and FLOPs are known (`ds_dgemma/model/flops.py`), and so is what they took: the time above that of the same
model with six sliding layers. The last column foretells it from the length before: four times for a doubling.

--check: per doubling at most 2.1 times the memory, for both models, and 2.2 times the time where all layers slide; at
the longest a process of less than 6 GiB. Exit code 1 otherwise.
"""

import argparse
import ctypes
import json
import os
import resource
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from transformers import DiffusionGemmaConfig

from ds_dgemma.tools.tiny import small_config

ROOT = Path(__file__).resolve().parents[2]
SLIDING, FULL = "sliding_attention", "full_attention"
LAYERS = {"sliding only": [SLIDING] * 6, "5 sliding : 1 full": [*[SLIDING] * 5, FULL]}
LENGTHS = (2048, 4096, 8192, 16384, 32768)
CANVAS, VOCABULARY = 256, 1024
MEMORY_PER_DOUBLING, TIME_PER_DOUBLING, MOST_GIB = 2.1, 2.2, 6
KIB, MIB, GIB = 2**10, 2**20, 2**30
M_MMAP_THRESHOLD = -3  # malloc.h


def config(layer_types: list[str]) -> DiffusionGemmaConfig:
    """A tiny model with a window of 1,024, as the released one has it. transformers makes the last layer a full one."""
    text: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": len(layer_types),
        "layer_types": layer_types,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_global_key_value_heads": 1,
        "global_head_dim": 64,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
        "sliding_window": 1024,
        "max_position_embeddings": max(LENGTHS),
    }
    return small_config(text, CANVAS)


def resident_bytes() -> int:
    """Of this process, now; its peak is the kernel's own, so that no moment is missed."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def map_from(size: int) -> None:
    """Let glibc ask the kernel for memory of this size and more, and give it back when it is freed, as it does at once
    with what is free in its heap: what is resident is then what is held. It keeps freed pieces by chance, a fifth more
    or less of the peak.
    """
    glibc = ctypes.CDLL(None)
    assert glibc.mallopt(M_MMAP_THRESHOLD, size)
    glibc.malloc_trim(0)


def peak_bytes() -> int:
    """The most that this process has had resident; `getrusage` would count what its parent had when it was started."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * KIB for line in lines if line.startswith("VmHWM:"))


def measure(model: str, length: int, checkpointing: Any) -> dict[str, float]:
    """One step of one example in this process."""
    from ds_dgemma.engine.expert_parallel import place_experts
    from ds_dgemma.model.build import build_stack
    from ds_dgemma.model.flops import clean_pairs, products_of
    from ds_dgemma.objective.denoising import DenoisingObjective, TokenWeights
    from tests.benchmarks.step import make_batch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    kinds = LAYERS[model]
    stack = build_stack(config([*kinds, FULL]), activation_checkpointing=checkpointing)
    stack.layers, stack.layer_types = stack.layers[: len(kinds)], tuple(kinds)
    place_experts(stack, 1, 0, grouped=False)
    rotary = stack.rotary_emb  # computed, not stored
    stack.rotary_emb = torch.nn.Identity()
    stack.to_empty(device="cpu").rotary_emb = rotary
    torch.manual_seed(0)
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for name, buffer in stack.named_buffers():
        if "layer_scalar" in name:
            buffer.fill_(1.0)
    objective = DenoisingObjective(stack, 16).train()

    def step(tokens: int) -> float:
        batch = make_batch(tokens - CANVAS, CANVAS, 1, VOCABULARY, CANVAS)
        began = time.process_time()
        objective(batch, TokenWeights.global_mean(*batch.counts(), 1.0, 1)).loss.backward()
        return time.process_time() - began

    step(2 * CANVAS)
    map_from(64 * KIB)
    before = resident_bytes()
    step(length)
    peak = peak_bytes()
    map_from(32 * MIB)  # what glibc itself arrives at
    seconds = step(length)
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in stack.parameters())
    full = [layer for layer in products_of(stack).layers if layer.window is None]
    flops = sum(
        layer.forward(0, clean_pairs(length, None)) + layer.backward(0, clean_pairs(length, None)) for layer in full
    )
    return {"memory": peak - before, "peak": peak, "seconds": seconds, "full_flops": flops}


def report(seen: dict[str, dict[int, dict[str, float]]]) -> str:
    """Markdown, a row per length."""
    sliding, mixed = (seen[model] for model in LAYERS)
    columns = ["MiB of the step (times)", "process, MiB", "CPU s (times)"]
    heads = [f"{model}: {column}" for model in LAYERS for column in columns]
    heads += ["full layer's attention, TFLOP", "s above sliding only", "s foretold"]
    lines = [f"| tokens | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    before, above_before = None, None
    for length in sliding:
        cells = [f"{length:,}"]
        for found in (sliding, mixed):
            here, last = found[length], found[before] if before else None
            times = {key: f" ({here[key] / last[key]:.2f})" if last else "" for key in ("memory", "seconds")}
            cells += [f"{here['memory'] / MIB:,.0f}{times['memory']}", f"{here['peak'] / MIB:,.0f}"]
            cells.append(f"{here['seconds']:.1f}{times['seconds']}")
        above = mixed[length]["seconds"] - sliding[length]["seconds"]
        foretold = "" if above_before is None or before is None else f"{above_before * (length / before) ** 2:.1f}"
        cells += [f"{mixed[length]['full_flops'] / 1e12:.3f}", f"{above:.1f}", foretold]
        lines.append(f"| {' | '.join(cells)} |")
        before, above_before = length, above
    return "\n".join(lines)


def failures(seen: dict[str, dict[int, dict[str, float]]]) -> list[str]:
    """What --check refuses."""
    found = []
    for model, lengths in seen.items():
        limits = {"memory": MEMORY_PER_DOUBLING} | ({"seconds": TIME_PER_DOUBLING} if model == "sliding only" else {})
        for short, long in pairwise(lengths):
            for key, limit in limits.items():
                times = lengths[long][key] / lengths[short][key]
                if times > limit:
                    found.append(f"{model}, {short:,} to {long:,} tokens: {times:.2f} times the {key}, at most {limit}")
        longest = lengths[max(lengths)]["peak"] / GIB
        if longest >= MOST_GIB:
            found.append(f"{model}, {max(lengths):,} tokens: a process of {longest:.1f} GiB, under {MOST_GIB} asked")
    return found


def main(argv: list[str]) -> int:
    """Run every length of both models, print the table; 1 when --check refuses something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens, each twice the one before")
    parser.add_argument("--checkpointing", choices=["full", "selective", "none"], default="full")
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "LENGTH"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(measure(args.child[0], int(args.child[1]), args.checkpointing)))
        return 0
    if any(long != 2 * short for short, long in pairwise(args.lengths)):
        parser.error("--lengths: each must be twice the one before")
    seen: dict[str, dict[int, dict[str, float]]] = {model: {} for model in LAYERS}
    for length in args.lengths:
        for model, found in seen.items():
            child = [
                "-m",
                "tests.benchmarks.length",
                "--checkpointing",
                args.checkpointing,
                "--child",
                model,
                str(length),
            ]
            run = subprocess.run([sys.executable, *child], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
            found[length] = json.loads(run.stdout.splitlines()[-1])
    print(report(seen))
    refused = failures(seen) if args.check else []
    print("\n".join(refused))
    return int(bool(refused))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
