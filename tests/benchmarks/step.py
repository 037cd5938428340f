"""Time one forward and backward of this project and of transformers' training hooks, side by side in one run.

    python tests/benchmarks/step.py [--prompt 128 --response 256 --batch 4] [--experts plain] [--device cuda --dtype
    bfloat16]

A small model is made on the spot by unmodified transformers; all variants start from its checkpoint and see the
same batch:

- `ds_dgemma`: the stack and the objective, every layer recomputed in the backward pass; `ds_dgemma, kept`: nothing
  recomputed;
- `transformers`: its documented hooks. Encoder into a `DynamicCache`, decoder pass 1 without gradient, pass 2 with
  `self_conditioning_logits` and `self_conditioning_mask`, cross-entropy on whole logits.

No optimizer. Every repeat is a process of its own, variants take turns, and a process's first step is dropped.
Compare CPU seconds where other work shares the machine. Memory is the process's peak (CPU: resident; CUDA:
allocated), model included. The losses are printed because only equal work may be compared. Dated results: README.md
beside this file.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.cache_utils import DynamicCache

from ds_dgemma.config.run import ObjectiveSection
from ds_dgemma.data.batch import Batch
from ds_dgemma.objective.collate import collate
from ds_dgemma.objective.corruption import Corruption
from ds_dgemma.tools.tiny import small_config
from tests.reference.examples import one_answer
from tests.reference.masks import attention_masks, clean_and_canvases

CHECKPOINTING = {"ds_dgemma": "full", "ds_dgemma, selective": "selective", "ds_dgemma, kept": "none"}
TRANSFORMERS = "transformers"
CANVAS = 64  # tokens
Step = Callable[[Batch], tuple[float, float]]  # one forward and backward: diffusion and AR loss, nats per scored token


def make_model(directory: Path, vocabulary: int) -> None:
    """Save a four-layer DiffusionGemma of random weights."""
    text: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "num_global_key_value_heads": 2,
        "global_head_dim": 64,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 128,
        "sliding_window": 128,
        "max_position_embeddings": 4096,
    }
    torch.manual_seed(0)
    DiffusionGemmaForBlockDiffusion(small_config(text, CANVAS)).save_pretrained(directory)


def make_batch(prompt: int, response: int, size: int, vocabulary: int, canvas: int = CANVAS) -> Batch:
    """Random conversations of one length; every second example is self-conditioned."""
    draw = np.random.default_rng(7)
    rows = []
    for row in range(size):
        tokens = draw.integers(3, vocabulary - 3, prompt + response)
        rows.append((one_answer(row, tokens, prompt, canvas, eos_id=int(tokens[-1])), 0))
    corruption = Corruption(ObjectiveSection(), seed=0, vocab_size=vocabulary)
    return collate(corruption, rows).with_coins(torch.arange(size) % 2 == 0)


def open_ours(directory: Path, args: argparse.Namespace, checkpointing: Any) -> Step:
    """The stack with its objective, as one rank without ZeRO holds it."""
    from ds_dgemma.checkpoint.load import check_places, materialise, plain
    from ds_dgemma.checkpoint.weights import WeightReader
    from ds_dgemma.model.build import build_stack
    from ds_dgemma.model.names import places_of
    from ds_dgemma.model.spec import read_spec
    from ds_dgemma.objective.denoising import DenoisingObjective, TokenWeights

    spec, dtype = read_spec(str(directory)), getattr(torch, args.dtype)
    stack = build_stack(spec, activation_checkpointing=checkpointing)
    if args.experts == "expert_parallel":
        from ds_dgemma.engine.expert_parallel import place_experts

        place_experts(stack, 1, 0, args.device == "cuda" and dtype is torch.bfloat16)
    reader = WeightReader(directory)
    make_real = plain(dtype, args.device)
    materialise(stack, reader, check_places(stack, places_of(stack), reader), make_real, device=args.device)
    objective = DenoisingObjective(stack, args.logits_chunk_mib).train()

    def step(batch: Batch) -> tuple[float, float]:
        objective.zero_grad()
        diffusion, ar = batch.counts()
        parts = objective(batch, TokenWeights.global_mean(diffusion, ar, 1.0, 1))
        parts.loss.backward()
        return float(parts.diffusion_nll) / diffusion, float(parts.ar_nll) / ar

    return step


def open_transformers(directory: Path, args: argparse.Namespace) -> Step:
    """transformers' model through its public forward, with the masks of the same batch."""
    dtype = getattr(torch, args.dtype)
    model: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(directory, dtype=dtype).to(args.device).train()
    for layer in model.model.decoder.layers:
        layer.router.requires_grad_(False)
    text: Any = model.config.text_config
    window, cap = text.sliding_window, text.final_logit_softcapping

    def step(batch: Batch) -> tuple[float, float]:
        model.zero_grad()
        ids = batch.clean_ids_S.unflatten(0, (len(batch.documents), -1))
        S = ids.shape[1]
        layouts = [clean_and_canvases([S], [(0, start)], CANVAS) for _, start in batch.canvases]
        of_documents = [attention_masks(layout, window) for layout in layouts]
        masks = {
            kind: torch.stack([masks[kind] for masks in of_documents]).unsqueeze(1).to(args.device)
            for kind in of_documents[0]
        }
        position = torch.stack([layout.position_T[S:] for layout in layouts]).to(args.device)
        encoded = model.model.encoder(
            input_ids=ids,
            attention_mask={kind: mask[..., :S, :S] for kind, mask in masks.items()},
            past_key_values=DynamicCache(),  # without a config it keeps every key
        )
        canvas = dict(
            past_key_values=encoded.past_key_values,
            decoder_input_ids=batch.canvas_ids_CL,
            decoder_attention_mask={kind: mask[..., S:, :] for kind, mask in masks.items()},
            decoder_position_ids=position,
        )
        coin = batch.self_condition_C
        with torch.no_grad():
            guess = model(**canvas).logits
        logits = model(self_conditioning_logits=guess, self_conditioning_mask=coin, **canvas)
        del guess
        diffusion = F.cross_entropy(logits.logits.flatten(0, 1), batch.target_ids_CL.flatten())
        del logits
        clean = torch.tanh(model.lm_head(encoded.last_hidden_state).float() / cap) * cap
        ar = F.cross_entropy(clean[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        del clean, encoded, canvas
        (diffusion + ar).backward()
        return float(diffusion.detach()), float(ar.detach())

    return step


def measure(variant: str, directory: Path, args: argparse.Namespace) -> dict:
    """One repeat in this process: a dropped step, then `args.steps` timed ones."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    cuda = args.device == "cuda"
    if variant == TRANSFORMERS:
        step = open_transformers(directory, args)
    else:
        step = open_ours(directory, args, CHECKPOINTING[variant])
    batch = make_batch(args.prompt, args.response, args.batch, args.vocabulary).to(args.device)
    wall, cpu, losses = [], [], (0.0, 0.0)
    for _ in range(1 + args.steps):
        began, spent = time.perf_counter(), time.process_time()
        losses = step(batch)  # its floats wait for the device's forward, the synchronize below for its backward
        if cuda:
            torch.cuda.synchronize()
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - spent)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"wall": wall[1:], "cpu": cpu[1:], "peak_mib": peak / 2**20, "losses": losses}


def report(seen: dict[str, list[dict]]) -> str:
    """Markdown: a row per variant, medians with their range, then the ratios to transformers."""
    lines = ["| | CPU s | wall s | peak MiB | diffusion loss | AR loss |", "|---|---|---|---|---|---|"]
    middle: dict[str, tuple[float, ...]] = {}
    for variant, repeats in seen.items():
        columns = [[second for repeat in repeats for second in repeat[key]] for key in ("cpu", "wall")]
        columns.append([repeat["peak_mib"] for repeat in repeats])
        middle[variant] = tuple(statistics.median(column) for column in columns)
        cells = [
            f"{statistics.median(column):.{digits}f} ({min(column):.{digits}f} to {max(column):.{digits}f})"
            for column, digits in zip(columns, (2, 2, 0), strict=True)
        ]
        losses = [f"{loss:.6f}" for loss in repeats[-1]["losses"]]
        lines.append(f"| {' | '.join([variant, *cells, *losses])} |")
    lines.append("")
    for variant in [variant for variant in seen if variant in CHECKPOINTING]:
        cpu, wall, peak = (a / b for a, b in zip(middle[variant], middle[TRANSFORMERS], strict=True))
        lines.append(f"{variant} / transformers: CPU time {cpu:.2f}, wall time {wall:.2f}, peak memory {peak:.2f}")
    return "\n".join(lines)


def losses_differ(seen: dict[str, list[dict]], tolerance: float) -> bool:
    """Whether variants computed different losses: then their times compare different work."""
    losses = [repeat["losses"] for repeats in seen.values() for repeat in repeats]
    return any(max(column) - min(column) > tolerance for column in zip(*losses, strict=True))


def main(argv: list[str]) -> int:
    """Run all repeats and print the table; 1 when the variants' losses differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--response", type=int, default=256, help=f"tokens, a multiple of {CANVAS}")
    parser.add_argument("--batch", type=int, default=4, help="examples")
    parser.add_argument(
        "--vocabulary", type=int, default=4096, help="tokens; 4096: a fifth of the arithmetic, as at 26B"
    )
    parser.add_argument("--experts", choices=["expert_parallel", "plain"], default="expert_parallel", help="our layer")
    parser.add_argument("--logits-chunk-mib", type=int, default=256, help="objective.logits_chunk_mib")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=3, help="processes per variant")
    parser.add_argument("--steps", type=int, default=2, help="timed steps per process")
    parser.add_argument(
        "--checkpointing", nargs="+", choices=CHECKPOINTING.values(), default=CHECKPOINTING.values(), help="variants"
    )
    parser.add_argument("--child", nargs=2, metavar=("VARIANT", "MODEL"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    os.environ.setdefault("DS_ACCELERATOR", args.device)
    if args.response % CANVAS:
        parser.error(f"--response {args.response} is not a multiple of {CANVAS}")
    if args.child:
        print(json.dumps(measure(args.child[0], Path(args.child[1]), args)))
        return 0
    ours = [variant for variant, how in CHECKPOINTING.items() if how in args.checkpointing]
    seen: dict[str, list[dict]] = {variant: [] for variant in (*ours, TRANSFORMERS)}
    with tempfile.TemporaryDirectory() as model:
        make_model(Path(model), args.vocabulary)
        for _ in range(args.repeats):
            for variant, repeats in seen.items():
                command = [sys.executable, __file__, *argv, "--child", variant, model]
                run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                repeats.append(json.loads(run.stdout.splitlines()[-1]))
    print(report(seen))
    if differ := losses_differ(seen, 1e-4 if args.dtype == "float32" else 3e-2):
        print("The variants' losses differ: they did not do the same work.")
    return int(differ)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
