"""CPU time of answers: our sampler beside transformers' `generate()`, the same model, prompts, seeds and tokens.

    python -m tests.benchmarks.generate [--prompt 1024] [--canvases 2] [--prompts 4] [--steps 16] [--repeats 3]

The model is `step.py`'s, with random weights, at the released model's proportions. `together`: all prompts in one batch
of `generate()`, one group here; `alone`: one call a prompt, as a plain script does, and here so many groups in a batch.
Random weights never stop early, so every canvas takes all steps; a trained model's canvases end at different steps, so
groups of one prompt gain more there. The tokens must be equal, or the exit code is 1.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from transformers import DiffusionGemmaForBlockDiffusion

from ds_dgemma.evaluation.sampler import Group, Sampler
from ds_dgemma.evaluation.sampler_settings import read_settings
from tests.benchmarks.step import CANVAS, make_model
from tests.generate_parity import open_plain

VOCABULARY = 4096
Tokens = list[list[int]]


def seconds(work: Callable[[], Tokens], repeats: int) -> tuple[float, Tokens]:
    """Median CPU seconds and what was said, one run before that does not count."""
    said, took = work(), []
    for _ in range(repeats):
        began = time.process_time()
        said = work()
        took.append(time.process_time() - began)
    return statistics.median(took), said


def main() -> int:
    """Measure both; 1 when tokens differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=1024, metavar="TOKENS")
    parser.add_argument("--canvases", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=16, help="denoising steps a canvas")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY - 3, (args.prompts, args.prompt), generator=draw)
    length = {"max_new_tokens": args.canvases * CANVAS, "max_denoising_steps": args.steps}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), VOCABULARY)
        sampler = Sampler(open_plain(Path(folder)), read_settings(Path(folder), length), torch.device("cpu"))
        loaded: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        theirs = loaded.eval()

        def generate(rows: torch.Tensor, seed: int) -> Tokens:
            torch.manual_seed(seed)
            said = theirs.generate(input_ids=rows, disable_compile=True, **length).sequences
            return said[:, args.prompt :].tolist()

        def ours(groups: list[Group]) -> Tokens:
            return [answer.tokens for group in sampler.answer(groups) for answer in group]

        prompts = ids.tolist()
        pairs: dict[str, tuple[Callable[[], Tokens], Callable[[], Tokens]]] = {
            "together": (lambda: generate(ids, 0), lambda: ours([Group(prompts, 0)])),
            "alone": (
                lambda: [said for n, row in enumerate(ids) for said in generate(row[None], n)],
                lambda: ours([Group([prompt], n) for n, prompt in enumerate(prompts)]),
            ),
        }
        differ = 0
        for name, (their_way, our_way) in pairs.items():
            (their_cpu, wanted), (our_cpu, said) = seconds(their_way, args.repeats), seconds(our_way, args.repeats)
            equal = sum(
                a == b for one, other in zip(said, wanted, strict=True) for a, b in zip(one, other, strict=True)
            )
            total = sum(map(len, wanted))
            differ += total - equal
            print(f"{name}: {our_cpu:.2f} s CPU, transformers {their_cpu:.2f}, ratio {our_cpu / their_cpu:.2f}")
            print(f"    {equal} of {total} tokens equal")
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
