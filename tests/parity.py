"""Hold the backbone and the objective against numbers that unmodified transformers made.

    python tests/parity.py DIR [--dtype float32|float64] [--ep 2] [--verbose]

DIR holds cases, each a folder with `model/` (a transformers checkpoint), `case.safetensors` (a batch and what is
expected of it) and `grad_norms.json`; `tests/reference/fixtures.py` makes such a folder. Every case runs with three
sets of self-conditioning coins.

float32 (default): as training would, ZeRO-3 and expert parallelism on DeepSpeed, in one process or in `--ep`
processes that this script starts itself. float64: transformers' own experts, no engine. Exit 1 when any difference
is above its tolerance.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file

from ds_dgemma.checkpoint.load import materialise, plain
from ds_dgemma.checkpoint.names import DECODER, is_expert, place_of
from ds_dgemma.checkpoint.weights import WeightReader
from ds_dgemma.data.batch import Batch
from ds_dgemma.engine.ranks import RankLayout, connect, disconnect, free_port
from ds_dgemma.model.build import build_stack
from ds_dgemma.model.spec import read_spec
from ds_dgemma.objective.denoising import DenoisingObjective, TokenWeights
from ds_dgemma.objective.noise import first_pass
from tests.reference.float64 import DoublePrecision

COINS = ("none", "all", "mixed")
QUANTITIES = ("diffusion loss", "AR loss", "pass-2 logits", "encoder lse", "gradient norm")
# absolute for losses and logits (largest element), relative for gradient norms
TOLERANCES = {"float32": (2e-4, 2e-4, 5e-3, 5e-3, 2e-3), "float64": (1e-9, 1e-9, 1e-5, 1e-9, 1e-6)}


@dataclass(frozen=True)
class Observed:
    """One step's numbers; rows are this rank's."""

    diffusion_nll: float
    ar_nll: float
    hidden_NH: torch.Tensor  # what the loss was computed from: canvas tokens, then clean ones
    grad_square: dict[str, float]  # checkpoint tensor -> squared norm over all ranks


def to_batch(case: dict[str, torch.Tensor], coins: str, rows: slice, bucket: int = 16) -> Batch:
    """The case's batch in our container, `rows` of it."""
    part = {name: value[rows] for name, value in case.items() if not name.startswith("expected")}
    start, coin = part["canvas_start"][:, None], part[f"coins.{coins}"][:, None]
    return Batch(
        clean_ids_BS=part["input_ids"],
        clean_valid_BS=part["attention_mask"].bool(),
        canvas_ids_BKL=part["canvas_ids"][:, None],
        target_ids_BKL=part["target_ids"][:, None],
        supervised_BKL=part["canvas_loss_mask"][:, None],
        canvas_start_BK=start,
        self_condition_BK=coin,
        first_pass=first_pass(coin.numpy(), start.numpy(), part["input_ids"].shape[1], bucket),
        sample_ids=tuple(range(len(coin))),
        noise_levels=(),
    )


def capture_hidden(objective: DenoisingObjective) -> list[torch.Tensor]:
    """Keep what the loss reads: the first input of every scoring call."""
    seen: list[torch.Tensor] = []

    def hook(module: torch.nn.Module, inputs: tuple) -> None:
        if inputs[0].__name__ == "_Score":
            seen.append(inputs[1].detach().clone())

    objective.model.embed_tokens.register_forward_pre_hook(hook)
    return seen


def run_float64(directory: Path, case: dict[str, torch.Tensor], train_router: bool):
    """Yield one `Observed` per set of coins, in double precision throughout."""
    stack = build_stack(read_spec(str(directory / "model")), train_router=train_router, activation_checkpointing=False)
    materialise(stack, WeightReader(directory / "model"), plain(torch.float64, "cpu"), device="cpu")
    objective = DenoisingObjective(stack, logits_chunk_mib=1).train()
    seen = capture_hidden(objective)
    for coins in COINS:
        batch = to_batch(case, coins, slice(None))
        objective.zero_grad()
        with DoublePrecision():
            parts = objective(batch, TokenWeights.global_mean(*batch.counts(), 1.0, 1))
            parts.loss.backward()
        squares = {DECODER + n: float(p.grad.square().sum()) for n, p in stack.named_parameters() if p.grad is not None}
        yield Observed(float(parts.diffusion_nll), float(parts.ar_nll), seen.pop(), squares)


def run_engine(directory: Path, case: dict[str, torch.Tensor], train_router: bool, ranks: RankLayout, args):
    """Yield one `Observed` per set of coins, as training would compute it; this rank's rows."""
    from ds_dgemma.engine.deepspeed_engine import start_engine
    from ds_dgemma.engine.open_model import open_model

    total = len(case["input_ids"])
    rows = slice(ranks.rank * total // ranks.world, (ranks.rank + 1) * total // ranks.world)
    bf16 = args.dtype == "bfloat16"
    config = {
        "train_micro_batch_size_per_gpu": total // ranks.world,
        "zero_optimization": {"stage": args.stage, "stage3_param_persistence_threshold": 1000},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}},
        "steps_per_print": 10**9,
        **({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}} if bf16 else {}),
    }
    spec = read_spec(str(directory / "model"))
    stack = open_model(
        spec, directory / "model", ranks, config,
        precision="bf16" if bf16 else "fp32", grouped_matmul=args.grouped, train_router=train_router,
    )  # fmt: skip
    objective = DenoisingObjective(stack, logits_chunk_mib=1).train()
    seen = capture_hidden(objective)
    engine = start_engine(objective, config)
    everything = to_batch(case, "none", slice(None))
    for coins in COINS:
        batch = to_batch(case, coins, rows).to(ranks.device)
        parts = engine(batch, TokenWeights.global_mean(*everything.counts(), 1.0, ranks.world))
        engine.backward(parts.loss)
        squares = gradient_squares(engine, ranks)
        engine.step()  # lr 0: the weights stay
        sums = torch.stack([parts.diffusion_nll, parts.ar_nll]).double()
        dist.all_reduce(sums)
        yield Observed(float(sums[0]), float(sums[1]), seen.pop(), squares)
    engine.destroy()


def gradient_squares(engine, ranks: RankLayout) -> dict[str, float]:
    """Squared gradient norm of every checkpoint tensor, over all ranks."""
    from deepspeed.utils import safe_get_full_grad

    squares: dict[str, float] = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        square = safe_get_full_grad(parameter).double().square().sum()
        if is_expert(name):  # every rank of an expert group has its own part, every replica of the group the same
            dist.all_reduce(square)
            square /= ranks.world / ranks.expert_parallel_size
        tensor = place_of(name, (1,) * 3).tensor
        squares[tensor] = squares.get(tensor, 0.0) + float(square)
    return squares


def compare(
    seen: Observed,
    case: dict[str, torch.Tensor],
    coins: str,
    norms: dict[str, float],
    rows: slice,
    directory: Path,
):
    """Differences in the order of QUANTITIES, and the parameter whose gradient norm is furthest off."""
    expected = {
        k.removeprefix("expected."): v[rows] if v.shape[0] > 1 else v for k, v in case.items() if "expected" in k
    }
    canvas, clean = case["canvas_ids"][rows], case["input_ids"][rows]
    spec = read_spec(str(directory / "model")).text_config
    weight = WeightReader(directory / "model").read(DECODER + "embed_tokens.weight").to(seen.hidden_NH)
    cap = spec.final_logit_softcapping
    logits = (
        torch.tanh(F.linear(seen.hidden_NH, weight).to(torch.promote_types(weight.dtype, torch.float32)) / cap) * cap
    )
    logits = logits.cpu()
    canvas_logits = logits[: canvas.numel()].view(*canvas.shape, -1)
    lse = logits[canvas.numel() :].logsumexp(-1).view(len(clean), -1)
    valid = case["attention_mask"][rows].bool()[:, :-1]
    pairs = (case["attention_mask"][:, 1:] & case["attention_mask"][:, :-1]).sum()
    furthest = {
        name: abs(seen.grad_square[name] ** 0.5 - norm) / norm if norm > 1e-9 else seen.grad_square[name] ** 0.5
        for name, norm in norms.items()
    }
    extra = set(seen.grad_square) - set(norms)
    assert not extra, f"gradients that transformers does not have: {sorted(extra)}"
    worst = max(furthest, key=lambda name: furthest[name])
    differences = (
        abs(seen.diffusion_nll / float(case["canvas_loss_mask"].sum()) - float(expected[f"{coins}.diffusion_loss"])),
        abs(seen.ar_nll / float(pairs) - float(expected[f"{coins}.ar_loss"])),
        float((canvas_logits - expected[f"{coins}.pass2_logits"]).abs().max()),
        float(((lse - expected["encoder_logsumexp"][:, :-1]) * valid).abs().max()),
        furthest[worst],
    )
    return differences, worst, furthest


def start_ranks(argv: list[str], count: int) -> int:
    """Run this script once per rank; the first failure ends the others."""
    environment = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(count))
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, *argv], env={**environment, "RANK": str(r), "LOCAL_RANK": str(r),
            "LOCAL_WORLD_SIZE": str(count)}
        )
        for r in range(count)
    ]  # fmt: skip
    codes = [rank.wait() for rank in ranks]
    return max(abs(code) for code in codes)


def main(argv: list[str]) -> int:
    """Compare every case; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path)
    parser.add_argument("--dtype", choices=["float32", "float64", "bfloat16"], default="float32")
    parser.add_argument("--ep", type=int, default=1, help="ranks and expert-parallel size")
    parser.add_argument("--stage", type=int, default=3, help="ZeRO stage")
    parser.add_argument("--grouped", action="store_true", help="grouped matrix multiplication (CUDA)")
    parser.add_argument("--verbose", action="store_true", help="every parameter's gradient norm")
    args = parser.parse_args(argv)
    directories = sorted(path.parent for path in args.cases.glob("*/case.safetensors"))
    if not directories:
        parser.error(f"{args.cases} holds no case: no */case.safetensors")
    if args.ep > 1 and "RANK" not in os.environ:
        return start_ranks(argv, args.ep)
    ranks = RankLayout.from_environment(args.ep)
    if args.dtype != "float64":
        connect(ranks, timeout_minutes=5)
    failed = False
    if ranks.is_main:
        print(f"{'case':<16}{'coins':<7}" + "".join(f"{name:>15}" for name in QUANTITIES) + "  furthest gradient")
    for directory in directories:
        case = load_file(directory / "case.safetensors")
        norms = json.loads((directory / "grad_norms.json").read_text())
        train_router = any(name.endswith("router.scale") for name in norms["all"])
        total = len(case["input_ids"])
        rows = slice(ranks.rank * total // ranks.world, (ranks.rank + 1) * total // ranks.world)
        if args.dtype == "float64":
            runs = run_float64(directory, case, train_router)
        else:
            runs = run_engine(directory, case, train_router, ranks, args)
        for coins, seen in zip(COINS, runs, strict=True):
            differences, worst, every = compare(seen, case, coins, norms[coins], rows, directory)
            if ranks.world > 1:
                shared = torch.tensor(differences, dtype=torch.float64, device=ranks.device)
                dist.all_reduce(shared, dist.ReduceOp.MAX)
                differences = tuple(shared.tolist())
            tolerance = TOLERANCES.get(args.dtype, (float("inf"),) * 5)
            bad = [name for name, d, t in zip(QUANTITIES, differences, tolerance, strict=True) if not d <= t]
            failed |= bool(bad)
            if ranks.is_main:
                print(
                    f"{directory.name:<16}{coins:<7}" + "".join(f"{d:>15.1e}" for d in differences)
                    + f"  {worst.removeprefix(DECODER)}" + (f"  ABOVE TOLERANCE: {', '.join(bad)}" if bad else ""),
                    flush=True,
                )  # fmt: skip
                if args.verbose:
                    for name, difference in sorted(every.items()):
                        print(f"    {name:<72}{difference:>10.1e}")
    if args.dtype != "float64":
        disconnect()
    if ranks.is_main:
        print("FAILED" if failed else f"all {len(directories)} cases within tolerance")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
