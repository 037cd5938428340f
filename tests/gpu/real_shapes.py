"""Full-parameter training steps at the released model's shapes, in bf16 under ZeRO-3, with as many layers as fit.

    python -m tests.gpu.real_shapes [--layers N] [--rehearse]

The checkpoint is random (`tests/benchmarks/real_checkpoint.py`, 1.6 GB a layer and 1.5 GB of vocabulary in the
temporary directory) and loading is the real thing. Without --layers the largest number is tried that should fit, then
fewer, each in a process of its own; then one layer: the vocabulary dominates so few, and the difference is what a
layer costs.

FLOPs of a step are `ds_dgemma/model/flops.py`'s useful ones: none for what is computed again.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ds_dgemma.config.run import RunConfig
from ds_dgemma.engine.connect import connect
from ds_dgemma.engine.deepspeed_engine import start_engine
from ds_dgemma.engine.ds_config import deepspeed_config
from ds_dgemma.model.flops import batch_work, products_of
from ds_dgemma.model.spec import read_spec
from ds_dgemma.objective.denoising import DenoisingObjective, TokenWeights
from ds_dgemma.plan.plan import Limits, make_plan
from ds_dgemma.ranks.layout import RankLayout, disconnect
from ds_dgemma.run.open_model import fill_model, outline_model
from ds_dgemma.run.utilisation import documents_of
from ds_dgemma.tracking.metrics import peak_flops
from tests.benchmarks.real_checkpoint import make_checkpoint
from tests.benchmarks.step import make_batch
from tests.gpu import ROOT, shapes

OUT_OF_MEMORY = 3
GIB = 2**30
# Bytes per parameter: bf16 weight, fp32 master, moments and gradient; the vocabulary's buffer; gathered copies
STATE, VOCABULARY_EXTRA, LAYER_EXTRA = 18, 8, 4
WARM_UP, TIMED = 2, 5


def open_engine(layers: int, rehearse: bool, ranks: RankLayout) -> tuple[Any, int]:
    """The engine that a full-parameter run would have on one rank, and the peak of its memory as planned, bytes."""
    rows, where = shapes.lengths(rehearse)[2], ranks.device
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name, "model")
        make_checkpoint(shapes.config(rehearse, layers), directory)
        run = RunConfig.model_validate(
            {
                "run": {"dir": name},
                "model": {"path": str(directory)},
                "data": {"train": "none"},
                "train": {"max_steps": 1000, "global_batch_size": rows, "micro_batch_size": rows, "precision": "bf16"},
                "deepspeed": ROOT / "ds_configs" / "zero3.json",
            }
        )
        settings = deepspeed_config(run, 1, "cuda" if where.type == "cuda" else "cpu")
        grouped = where.type == "cuda"
        outlined = outline_model(read_spec(str(directory)), directory, ranks, grouped_matmul=grouped)
        stack = fill_model(outlined, ranks, settings, "bf16")
        clean, _, _ = shapes.lengths(rehearse)
        planned = make_plan(run, 1, Limits(80, None, 8), clean).memory.peak
    return start_engine(DenoisingObjective(stack, run.objective.logits_chunk_mib).train(), settings), planned


def matrix_weights(text: Any, layer: int) -> int:
    """Weights of a layer's matrix products that one token meets."""
    H, own = text.hidden_size, text.per_layer_config[layer]
    sliding = text.layer_types[layer] == "sliding_attention"
    projections = (2 if sliding else 1) * own.num_key_value_heads  # full attention: values are keys
    attention = H * own.head_dim * (2 * text.num_attention_heads + projections)
    experts = text.top_k_experts * 3 * H * text.moe_intermediate_size + H * text.num_experts
    return attention + 3 * H * text.intermediate_size + experts


def measure(layers: int, rehearse: bool) -> str:
    """Steps of `layers` layers in this process, as one line of figures."""
    ranks = RankLayout.from_environment(1)
    connect(ranks, timeout_minutes=5)
    engine, planned = open_engine(layers, rehearse, ranks)
    text = shapes.config(rehearse, layers).get_text_config()
    clean, canvas, rows = shapes.lengths(rehearse)
    here = make_batch(clean // 2, clean // 2, rows, text.vocab_size, canvas)
    batch = here.to(ranks.device)
    weights = TokenWeights.global_mean(*here.counts(), 1.0, 1)
    wait = torch.cuda.synchronize if ranks.device.type == "cuda" else lambda: None
    whole, without_optimizer, loss = [], [], torch.tensor(0.0)
    for _ in range(WARM_UP + TIMED):
        wait()
        began = time.perf_counter()
        loss = engine(batch, weights).loss
        engine.backward(loss)
        wait()
        without_optimizer.append(time.perf_counter() - began)
        engine.step()
        wait()
        whole.append(time.perf_counter() - began)
    assert torch.isfinite(loss), f"loss {loss}"
    seconds, backward_done = (statistics.median(times[WARM_UP:]) for times in (whole, without_optimizer))
    parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters())
    flops = batch_work(products_of(engine.module.model), documents_of([here]))
    figures = [
        f"layers {layers}, {parameters / 1e9:.2f} B parameters, {rows} x ({clean} + {canvas}) tokens",
        f"step {seconds:.3f} s (forward and backward {backward_done:.3f} s)",
        f"{here.tokens() / seconds:,.0f} tokens/s",
        f"{flops / 1e12:.2f} TFLOP, {flops / seconds / 1e12:.1f} TFLOP/s",
        f"planned peak {planned / GIB:.1f} GiB",
    ]
    if ranks.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(ranks.device), None)
        figures[-1] += f", {flops / backward_done / peak:.1%} of peak in forward and backward" if peak else ""
        figures.append(f"peak memory {torch.cuda.max_memory_allocated() / GIB:.1f} GiB")
    disconnect()
    return ", ".join(figures)


def layers_that_fit() -> int:
    """An upper guess from the bytes of weights and optimizer state; activations decide the rest."""
    text = shapes.config(False, layers=2).get_text_config()
    H = text.hidden_size
    layer = 3 * text.num_experts * H * text.moe_intermediate_size + matrix_weights(text, 0)
    vocabulary = text.vocab_size * H
    free, _ = torch.cuda.mem_get_info()
    left = free - 2 * GIB - (STATE + VOCABULARY_EXTRA) * vocabulary - LAYER_EXTRA * layer
    return max(1, left // (STATE * layer))


def main() -> int:
    """Measure here with --layers; otherwise find how many fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rehearse", action="store_true", help="a miniature on the CPU; needs --layers")
    args = parser.parse_args()
    if args.layers:
        try:
            print(f"FIGURE full SFT, {measure(args.layers, args.rehearse)}")
        except torch.OutOfMemoryError as error:
            print(f"{args.layers} layers do not fit: {str(error).splitlines()[0]}", file=sys.stderr)
            return OUT_OF_MEMORY
        return 0

    def start(layers: int) -> int:
        command = [sys.executable, "-m", "tests.gpu.real_shapes", "--layers", str(layers)]
        return subprocess.run(command, cwd=ROOT).returncode

    layers = layers_that_fit()
    while (code := start(layers)) == OUT_OF_MEMORY and layers > 1:
        layers -= 1
    return code or (start(1) if layers > 1 else 0)


if __name__ == "__main__":
    sys.exit(main())
