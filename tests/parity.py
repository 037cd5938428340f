"""Hold the backbone and the objective against numbers that unmodified transformers made.

    python tests/parity.py DIR [--dtype float32|float64] [--ep 2] [--verbose]

DIR holds cases, each a folder with `model/` (a transformers checkpoint), `case.safetensors` (a batch and what is
expected of it) and `grad_norms.json`; `tests/reference/fixtures.py` makes such a folder. Every case runs with three
sets of self-conditioning coins.

float32 (default): as training would, ZeRO-3 and expert parallelism on DeepSpeed, in one process or in `--ep` processes
that this script starts itself. Experts that do not divide by their number are split over fewer, which the case's line
says; a rank without rows of its own computes one that counts for nothing. float64: transformers' own experts, no
engine. Exit 1 when any difference is above its tolerance, 2 when the cases cannot be read.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ds_dgemma.checkpoint.load import find_places, materialise, plain
from ds_dgemma.checkpoint.names import DECODER, is_expert, place_of
from ds_dgemma.checkpoint.weights import WeightReader
from ds_dgemma.data.batch import Batch
from ds_dgemma.engine.ranks import RankLayout, connect, disconnect, free_port
from ds_dgemma.errors import EXIT_USER_ERROR, UserError, first_line
from ds_dgemma.model.build import build_stack
from ds_dgemma.model.spec import read_spec
from ds_dgemma.model.vocabulary import capped_logits
from ds_dgemma.objective.denoising import DenoisingObjective, TokenWeights
from ds_dgemma.objective.noise import first_pass
from tests.reference.float64 import DoublePrecision

COINS = ("none", "all", "mixed")
QUANTITIES = ("diffusion loss", "AR loss", "pass-2 logits", "encoder lse", "gradient norm")
# absolute for losses and logits (largest element), relative for gradient norms
TOLERANCES = {
    "float32": (2e-4, 2e-4, 5e-3, 5e-3, 2e-3),
    "float64": (1e-9, 1e-9, 1e-5, 1e-9, 1e-6),
    "bfloat16": (sys.float_info.max,) * 5,  # flips experts: only has to be finite
}
# A gradient norm below this share of the whole gradient's is a sum that cancels (top-1 routing weights, which a norm
# divides out again): rounding, so it is compared with this share instead of itself.
CANCELS = {"float32": 1e-4, "float64": 1e-9, "bfloat16": 1e-2}


@dataclass(frozen=True)
class Case:
    """A checkpoint, a batch, and what transformers made of them."""

    directory: Path
    text: Any  # transformers' config of the text model
    tensors: dict[str, Tensor]
    norms: dict[str, dict[str, float]]  # coins -> checkpoint tensor -> norm of its gradient

    @property
    def train_router(self) -> bool:
        """Whether the routers had gradients."""
        return any(name.endswith("router.scale") for name in self.norms["all"])

    @property
    def rows(self) -> int:
        """Examples of the batch."""
        return len(self.tensors["input_ids"])


@dataclass(frozen=True)
class Observed:
    """One step's numbers."""

    diffusion_nll: float  # sums over the whole batch
    ar_nll: float
    hidden_NH: Tensor  # what the loss was computed from, this rank's rows: canvas tokens, then clean ones
    grad_square: dict[str, float]  # checkpoint tensor -> squared norm over all ranks


def read_case(directory: Path) -> Case:
    """Read one case's folder."""
    try:
        tensors = load_file(directory / "case.safetensors")
        norms = json.loads((directory / "grad_norms.json").read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{directory} is no whole case: {first_line(error)}") from error
    lacking = {f"expected.{coins}.pass2_logits" for coins in COINS} - set(tensors)
    if lacking or set(COINS) - set(norms):
        raise UserError(f"{directory} is no whole case: {', '.join(COINS)} were expected as coins.")
    return Case(directory, read_spec(str(directory / "model")).text_config, tensors, norms)


def share(rows: int, ranks: RankLayout) -> slice:
    """This rank's rows; none when there are fewer rows than ranks."""
    return slice(ranks.rank * rows // ranks.world, (ranks.rank + 1) * rows // ranks.world)


def to_batch(tensors: dict[str, Tensor], coins: str, rows: slice = slice(None), bucket: int = 16) -> Batch:
    """`rows` of a case's batch in our container; no rows: the first one, with nothing in it that counts."""
    counts = rows.start is None or rows.start < rows.stop
    picked = rows if counts else slice(0, 1)
    part = {name: value[picked] for name, value in tensors.items() if not name.startswith("expected")}
    start, coin = part["canvas_start"][:, None], part[f"coins.{coins}"][:, None]
    return Batch(
        clean_ids_BS=part["input_ids"],
        clean_valid_BS=part["attention_mask"].bool() & counts,
        canvas_ids_BKL=part["canvas_ids"][:, None],
        target_ids_BKL=part["target_ids"][:, None],
        supervised_BKL=part["canvas_loss_mask"][:, None] & counts,
        canvas_start_BK=start,
        self_condition_BK=coin,
        first_pass=first_pass(coin.numpy(), start.numpy(), part["input_ids"].shape[1], bucket),
        sample_ids=tuple(range(len(coin))),
        noise_levels=(),
    )


def capture_hidden(objective: DenoisingObjective) -> list[Tensor]:
    """Keep what the loss reads: the first input of every scoring call."""
    seen: list[Tensor] = []

    def hook(module: torch.nn.Module, inputs: tuple) -> None:
        if inputs[0].__name__ == "_Score":
            seen.append(inputs[1].detach().clone())

    objective.model.embed_tokens.register_forward_pre_hook(hook)
    return seen


def open_float64(model: Path, train_router: bool) -> DenoisingObjective:
    """The objective in double precision, on transformers' own experts."""
    stack = build_stack(read_spec(str(model)), train_router=train_router, activation_checkpointing=False)
    reader = WeightReader(model)
    materialise(stack, reader, find_places(stack, reader), plain(torch.float64, "cpu"), device="cpu")
    return DenoisingObjective(stack, logits_chunk_mib=1).train()


def step_float64(objective: DenoisingObjective, batch: Batch) -> Observed:
    """One forward and backward in double precision throughout."""
    seen = capture_hidden(objective)
    objective.zero_grad()
    with DoublePrecision():
        parts = objective(batch, TokenWeights.global_mean(*batch.counts(), 1.0, 1))
        parts.loss.backward()
    squares = {
        DECODER + name: float(parameter.grad.square().sum())
        for name, parameter in objective.model.named_parameters()
        if parameter.grad is not None
    }
    return Observed(float(parts.diffusion_nll), float(parts.ar_nll), seen[0], squares)


def run_float64(case: Case) -> Iterator[Observed]:
    """One step per set of coins."""
    for coins in COINS:
        yield step_float64(open_float64(case.directory / "model", case.train_router), to_batch(case.tensors, coins))


def run_engine(case: Case, ranks: RankLayout, args: argparse.Namespace) -> Iterator[Observed]:
    """One step per set of coins, as training would compute it."""
    from ds_dgemma.engine.deepspeed_engine import start_engine
    from ds_dgemma.engine.open_model import fill_model, outline_model

    bf16 = args.dtype == "bfloat16"
    config = {
        "train_micro_batch_size_per_gpu": max(1, case.rows // ranks.world),
        "zero_optimization": {"stage": args.stage, "stage3_param_persistence_threshold": 1000},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}},
        "steps_per_print": 10**9,
        **({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}} if bf16 else {}),
    }
    outlined = outline_model(
        read_spec(str(case.directory / "model")),
        case.directory / "model",
        ranks,
        grouped_matmul=args.grouped,
        train_router=case.train_router,
    )
    stack = fill_model(outlined, ranks, config, "bf16" if bf16 else "fp32")
    objective = DenoisingObjective(stack, logits_chunk_mib=1).train()
    seen = capture_hidden(objective)
    engine = start_engine(objective, config)
    weights = TokenWeights.global_mean(*to_batch(case.tensors, "none").counts(), 1.0, ranks.world)
    for coins in COINS:
        batch = to_batch(case.tensors, coins, share(case.rows, ranks)).to(ranks.device)
        parts = engine(batch, weights)
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
        gradient = safe_get_full_grad(parameter)
        assert gradient is not None, f"{name} has no gradient"
        square = gradient.double().square().sum()
        if is_expert(name):  # each rank of an expert group has its own part, each replica of the group the same
            dist.all_reduce(square)
            square /= ranks.world / ranks.expert_parallel_size
        tensor = place_of(name, (1,) * 3).tensor
        squares[tensor] = squares.get(tensor, 0.0) + float(square)
    return squares


def compare(seen: Observed, case: Case, coins: str, dtype: str, rows: slice = slice(None)) -> list[float]:
    """Differences in the order of QUANTITIES, logits over `rows`; infinite where something is not a number."""
    expected, batch = case.tensors, to_batch(case.tensors, coins)
    diffusion_tokens, ar_tokens = (max(1, count) for count in batch.counts())
    canvas_logits, logsumexp = read_hidden(seen.hidden_NH, case, rows)
    wrong_logits = canvas_logits - expected[f"expected.{coins}.pass2_logits"][rows]
    valid = batch.clean_valid_BS[rows, :-1]
    wrong_logsumexp = (logsumexp - expected["expected.encoder_logsumexp"][rows, :-1])[valid]
    differences = (
        abs(seen.diffusion_nll / diffusion_tokens - float(expected[f"expected.{coins}.diffusion_loss"])),
        abs(seen.ar_nll / ar_tokens - float(expected[f"expected.{coins}.ar_loss"])),
        *(float(wrong.abs().max()) if wrong.numel() else 0.0 for wrong in (wrong_logits, wrong_logsumexp)),
        max(norm_differences(seen.grad_square, case.norms[coins], CANCELS[dtype]).values()),
    )
    return [math.inf if math.isnan(difference) else difference for difference in differences]


def read_hidden(hidden_NH: Tensor, case: Case, rows: slice) -> tuple[Tensor, Tensor]:
    """Canvas logits [B, L, V] and the encoder's log-sum-exp [B, S-1] of `rows`, through the checkpoint's embedding."""
    canvas, clean = case.tensors["canvas_ids"][rows], case.tensors["input_ids"][rows, :-1]
    if not len(canvas):  # the rank computed a row that counts for nothing
        return torch.empty(*canvas.shape, case.text.vocab_size), torch.empty(clean.shape)
    weight = WeightReader(case.directory / "model").read(DECODER + "embed_tokens.weight").to(hidden_NH)
    logits = capped_logits(hidden_NH, weight, case.text.final_logit_softcapping).cpu()
    canvas_logits = logits[: canvas.numel()].view(*canvas.shape, -1)
    return canvas_logits, logits[canvas.numel() :].logsumexp(-1).view(clean.shape)


def norm_differences(squares: dict[str, float], norms: dict[str, float], cancels: float) -> dict[str, float]:
    """Relative difference of every gradient norm; infinite where only one side has a gradient or it is not a number."""
    floor = cancels * math.sqrt(sum(norm**2 for norm in norms.values()))
    differences = {}
    for name in {*squares, *norms}:
        observed, norm = math.sqrt(squares.get(name, math.nan)), norms.get(name, math.nan)
        difference = abs(observed - norm) / max(floor, norm)
        differences[name] = math.inf if math.isnan(difference) else difference
    return differences


def start_ranks(argv: list[str], count: int) -> int:
    """Run this script once per rank; the first failure ends the others."""
    shared = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(count))
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, *argv, "--is-rank"],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)},
        )
        for rank in range(count)
    ]
    try:
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            time.sleep(0.1)
        return max(abs(rank.poll() or 0) for rank in ranks)
    finally:
        for rank in ranks:
            rank.terminate()
            rank.wait()


def run_case(case: Case, ranks: RankLayout, args: argparse.Namespace) -> bool:
    """Compare one case, print a line per set of coins; whether all is within tolerance."""
    # As many ranks as the experts divide by share them; the rest is data parallel.
    ranks = replace(ranks, expert_parallel_size=math.gcd(ranks.world, case.text.num_experts))
    fewer = f"  EP {ranks.expert_parallel_size}" if ranks.expert_parallel_size < ranks.world else ""
    good = True
    runs = run_float64(case) if args.dtype == "float64" else run_engine(case, ranks, args)
    for coins, seen in zip(COINS, runs, strict=True):
        differences = compare(seen, case, coins, args.dtype, share(case.rows, ranks))
        if ranks.world > 1:
            largest = torch.tensor(differences, dtype=torch.float64, device=ranks.device)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            differences = largest.tolist()
        limits = zip(QUANTITIES, differences, TOLERANCES[args.dtype], strict=True)
        above = [name for name, difference, limit in limits if not difference <= limit]
        good &= not above
        if ranks.is_main:
            every = norm_differences(seen.grad_square, case.norms[coins], CANCELS[args.dtype])
            furthest = max(every, key=lambda name: every[name]).removeprefix(DECODER)
            numbers = "".join(f"{difference:>15.1e}" for difference in differences)
            verdict = f"  ABOVE TOLERANCE: {', '.join(above)}" if above else ""
            print(f"{case.directory.name:<16}{coins:<7}{numbers}  {furthest}{fewer}{verdict}", flush=True)
            for name in sorted(every) if args.verbose else []:
                print(f"    {name:<72}{every[name]:>10.1e}")
    return good


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path)
    parser.add_argument("--dtype", choices=list(TOLERANCES), default="float32")
    parser.add_argument("--ep", type=int, default=1, help="ranks and expert-parallel size")
    parser.add_argument("--stage", type=int, choices=range(4), default=3, help="ZeRO stage")
    parser.add_argument("--grouped", action="store_true", help="grouped matrix multiplication (CUDA)")
    parser.add_argument("--verbose", action="store_true", help="every parameter's gradient norm")
    parser.add_argument("--is-rank", action="store_true", help=argparse.SUPPRESS)  # started by start_ranks
    args = parser.parse_args(argv)
    if args.ep < 1 or (args.ep > 1 and args.dtype == "float64"):
        parser.error("--ep is a number of ranks, and float64 runs in one process")
    return args


def main(argv: list[str]) -> int:
    """Compare every case; return the exit code."""
    args = parse(argv)
    try:
        directories = sorted(path.parent for path in args.cases.glob("*/case.safetensors"))
        if not directories:
            raise UserError(f"{args.cases} holds no case: no */case.safetensors there.")
        cases = [read_case(directory) for directory in directories]
        if args.dtype == "float64":
            return run_cases(cases, RankLayout(0, 1, 0, 1, 1), args)
        if not args.is_rank:
            return start_ranks(argv, args.ep)
        ranks = RankLayout.from_environment(args.ep)
        connect(ranks, timeout_minutes=5)
        code = run_cases(cases, ranks, args)
        disconnect()
        return code
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR


def run_cases(cases: list[Case], ranks: RankLayout, args: argparse.Namespace) -> int:
    """Compare all of them under one heading; return the exit code."""
    if ranks.is_main:
        print(f"{'case':<16}{'coins':<7}{''.join(f'{name:>15}' for name in QUANTITIES)}  furthest gradient")
    good = [run_case(case, ranks, args) for case in cases]
    if ranks.is_main:
        print(f"all {len(good)} cases within tolerance" if all(good) else f"{good.count(False)} of {len(good)} FAILED")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
