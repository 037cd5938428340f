"""Answers by our sampler beside transformers' `generate()`, on the same weights, prompts and seeds.

    python -m tests.gpu.sampler [--rehearse]

In fp32 at miniature shapes most tokens are equal: kernels round otherwise than transformers' here, and a bit is another
token some steps later, so the bar is the first canvas of most prompts (on a CPU all are equal, `generate_parity.py`).
In bf16 at real shapes with two layers: seconds of both, and the peak of our memory.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DiffusionGemmaForBlockDiffusion

from ds_dgemma.checkpoint.load import check_places, materialise, plain
from ds_dgemma.checkpoint.weights import WeightReader
from ds_dgemma.engine.expert_parallel import place_experts
from ds_dgemma.evaluation.sampler import Group, Sampler
from ds_dgemma.evaluation.sampler_settings import read_settings
from ds_dgemma.model.build import build_stack
from ds_dgemma.model.names import places_of
from ds_dgemma.model.spec import read_spec
from tests.benchmarks.real_checkpoint import make_checkpoint
from tests.gpu import shapes

PROMPTS, CANVASES, STEPS, LAYERS = 4, 2, 16, 2
Tokens = list[list[int]]


def timed(work: Callable[[], Tokens], wait: Callable[[], None]) -> tuple[Tokens, float]:
    """What was said the second time, and its seconds."""
    work()
    wait()
    began = time.perf_counter()
    said = work()
    wait()
    return said, time.perf_counter() - began


def our_way(
    directory: Path,
    dtype: torch.dtype,
    prompts: Tokens,
    length: dict[str, int],
    where: torch.device,
    wait: Callable[[], None],
) -> tuple[Tokens, float, float]:
    """What our sampler says, its seconds, and the peak of its memory in GiB."""
    stack, reader = build_stack(read_spec(str(directory))), WeightReader(directory)
    if where.type == "cuda":  # as `evaluation/open_model.py` has it
        place_experts(stack, 1, 0, grouped=dtype is torch.bfloat16)
    materialise(
        stack, reader, check_places(stack, places_of(stack), reader), plain(dtype, str(where)), device=str(where)
    )
    sampler = Sampler(stack.eval(), read_settings(directory, length), where)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    said, seconds = timed(lambda: [answer.tokens for answer in sampler.answer([Group(prompts, 0)])[0]], wait)
    return said, seconds, torch.cuda.max_memory_allocated() / 2**30 if where.type == "cuda" else 0.0


def compare(rehearse: bool, shape: bool, dtype: torch.dtype, directory: Path) -> tuple[float, float, float, float]:
    """Share of equal tokens in first canvases, our seconds, theirs, peak of our memory in GiB. `shape`: miniature."""
    where = shapes.device(rehearse)
    wait = torch.cuda.synchronize if where.type == "cuda" else lambda: None
    config = shapes.config(rehearse or shape, LAYERS)
    make_checkpoint(config, directory)
    clean, canvas, _ = shapes.lengths(rehearse or shape)
    vocabulary = config.get_text_config().vocab_size
    ids = torch.randint(3, vocabulary - 3, (PROMPTS, clean), generator=torch.Generator().manual_seed(0))
    length = {"max_new_tokens": CANVASES * canvas, "max_denoising_steps": STEPS}

    said, ours, peak = our_way(directory, dtype, ids.tolist(), length, where, wait)
    loaded: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa")
    model = loaded.eval().to(where)

    def generate() -> Tokens:
        torch.manual_seed(0)
        found = model.generate(input_ids=ids.to(where), disable_compile=True, **length).sequences
        return found[:, clean:].tolist()

    wanted, theirs = timed(generate, wait)
    pairs = [pair for a, b in zip(said, wanted, strict=True) for pair in zip(a[:canvas], b[:canvas], strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs), ours, theirs, peak


def main() -> int:
    """Compare at both shapes; 1 when too few tokens are equal in fp32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="miniature shapes on the CPU")
    rehearse = parser.parse_args().rehearse
    with tempfile.TemporaryDirectory() as name:
        equal, *_ = compare(rehearse, True, torch.float32, Path(name, "small"))
        print(f"FIGURE fp32, miniature: {equal:.1%} of the first canvases' tokens equal `generate()`'s")
        share, ours, theirs, peak = compare(rehearse, False, torch.bfloat16, Path(name, "real"))
    print(
        f"FIGURE bf16, real shapes, {LAYERS} layers, {PROMPTS} prompts, {CANVASES} canvases of {STEPS} steps: "
        f"{ours:.2f} s, transformers {theirs:.2f}, ratio {ours / theirs:.2f}, peak {peak:.1f} GiB, "
        f"{share:.1%} of tokens equal"
    )
    return int(equal < 0.5)


if __name__ == "__main__":
    sys.exit(main())
