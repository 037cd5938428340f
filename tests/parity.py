"""Hold the backbone and the objective against numbers that unmodified transformers made.

    python tests/parity.py DIR [--lora] [--images] [--dtype float32|float64] [--ep 2] [--verbose]

DIR holds cases, each a folder with `model/` (a transformers checkpoint), `case.safetensors` (a batch and what is
expected of it) and `grad_norms.json`; `tests/reference/fixtures.py` makes such a folder. Every case runs with three
sets of self-conditioning coins. --lora takes the cases with a `lora.safetensors`, an adapter of PEFT's on the model
(`tests/reference/lora.py`), reads it as training continues one, and compares the adapter's gradients too. Cases with
images have `pixel_values` [I, P, D], `image_position_ids` [I, P, 2], `image_of_row` [I] and `image_mask` [B, S] too.

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
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from ds_dgemma.checkpoint.adapter import CONFIG, PEFT, TENSORS
from ds_dgemma.checkpoint.load import check_places, materialise, plain
from ds_dgemma.checkpoint.weights import WeightReader
from ds_dgemma.config.run import LoraSection
from ds_dgemma.data.batch import Batch
from ds_dgemma.engine.connect import connect
from ds_dgemma.errors import EXIT_USER_ERROR, UserError
from ds_dgemma.model.build import build_stack
from ds_dgemma.model.lora import PREFIXES
from ds_dgemma.model.names import DECODER, is_expert, places_of
from ds_dgemma.model.spec import read_spec
from ds_dgemma.objective.denoising import DenoisingObjective, TokenWeights
from ds_dgemma.ranks.layout import RankLayout, disconnect, free_port
from tests.reference.cases import (
    CANCELS,
    COINS,
    QUANTITIES,
    TOLERANCES,
    Case,
    Observed,
    compare,
    norm_differences,
    read_case,
    read_lora,
    share,
    to_batch,
)
from tests.reference.float64 import DoublePrecision

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def capture_hidden(objective: DenoisingObjective) -> list[Tensor]:
    """Keep what the loss reads: the first input of every scoring call."""
    seen: list[Tensor] = []

    def hook(module: torch.nn.Module, inputs: tuple) -> None:
        if inputs[0].__name__ == "_Score":
            seen.append(inputs[1].detach().clone())

    objective.model.embed_tokens.register_forward_pre_hook(hook)
    return seen


def open_float64(model: Path, train_router: bool, lora: LoraSection | None = None) -> DenoisingObjective:
    """The objective in double precision, on transformers' own experts, or with `lora` on AutoEP's."""
    stack = build_stack(read_spec(str(model)), train_router=train_router)
    if lora is not None:
        from ds_dgemma.engine.expert_parallel import place_experts

        place_experts(stack, size=1, rank=0, grouped=False)
    reader, make_real = WeightReader(model), plain(torch.float64, "cpu")
    materialise(stack, reader, check_places(stack, places_of(stack), reader), make_real, device="cpu")
    stack.vision.open(torch.device("cpu"), torch.float64)
    if lora is not None:
        from ds_dgemma.engine.adapters import attach_adapters, choose_adapters

        attach_adapters(stack, choose_adapters(stack, lora, grouped_matmul=False), make_real)
    return DenoisingObjective(stack, logits_chunk_mib=1).train()


def step_float64(objective: DenoisingObjective, batch: Batch) -> Observed:
    """One forward and backward in double precision throughout."""
    seen = capture_hidden(objective)
    objective.zero_grad()
    with DoublePrecision():
        parts = objective(batch, TokenWeights.global_mean(*batch.counts(), 1.0, 1))
        parts.loss.backward()
    gradients = {n: p.grad for n, p in objective.model.named_parameters() if p.grad is not None}
    return Observed(float(parts.diffusion_nll), float(parts.ar_nll), seen[0], gradients)


def run_float64(case: Case) -> Iterator[Observed]:
    """One step per set of coins."""
    for coins in COINS:
        with lora_section(case) as lora:
            objective = open_float64(case.directory / "model", case.train_router, lora)
        yield step_float64(objective, to_batch(case.tensors, coins))


@contextmanager
def lora_section(case: Case) -> Iterator[LoraSection | None]:
    """The settings that continue a case's adapter, which lies in a PEFT directory meanwhile; None: it has none."""
    if case.lora is None:
        yield None
        return
    settings = {"r": case.lora.settings["r"], "lora_alpha": case.lora.settings["alpha"]}
    experts = EXPERTS if any(".experts." in name for name in case.lora.factors) else ()
    with tempfile.TemporaryDirectory() as folder:
        copies = {PEFT + name: value for name, value in case.lora.factors.items()}
        copies |= {name.replace(*PREFIXES): value.clone() for name, value in copies.items()}
        save_file(copies, Path(folder, TENSORS))
        lora = LoraSection(**settings, target_parameters=experts, path=Path(folder))
        targets = {"target_modules": lora.target_modules, "target_parameters": experts}
        Path(folder, CONFIG).write_text(json.dumps({"peft_type": "LORA", **settings, **targets}))
        yield lora


def open_engine(
    model: Path, ranks: RankLayout, rows: int, args: argparse.Namespace, lora: LoraSection | None, train_router: bool
) -> Any:
    """A checkpoint on DeepSpeed's engine as training holds it; `rows` of a micro-batch."""
    from ds_dgemma.engine.deepspeed_engine import start_engine
    from ds_dgemma.run.open_model import fill_model, outline_model

    bf16 = args.dtype == "bfloat16"
    config = {
        "train_micro_batch_size_per_gpu": rows,
        "zero_optimization": {"stage": args.stage, "stage3_param_persistence_threshold": 1000},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}},
        "steps_per_print": 10**9,
        **({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}} if bf16 else {}),
    }
    spec, grouped = read_spec(str(model)), args.grouped
    outlined = outline_model(spec, model, ranks, grouped_matmul=grouped, train_router=train_router, lora=lora)
    stack = fill_model(outlined, ranks, config, "bf16" if bf16 else "fp32")
    return start_engine(DenoisingObjective(stack, logits_chunk_mib=1).train(), config)


def run_engine(case: Case, ranks: RankLayout, args: argparse.Namespace) -> Iterator[Observed]:
    """One step per set of coins, as training would compute it."""
    rows = max(1, case.rows // ranks.world)
    with lora_section(case) as lora:
        engine = open_engine(case.directory / "model", ranks, rows, args, lora, case.train_router)
    seen = capture_hidden(engine.module)
    weights = TokenWeights.global_mean(*to_batch(case.tensors, "none").counts(), 1.0, ranks.world)
    for coins in COINS:
        batch = to_batch(case.tensors, coins, share(case.rows, ranks)).to(ranks.device)
        parts = engine(batch, weights)
        engine.backward(parts.loss)
        gradients = whole_gradients(engine, ranks)
        engine.step()  # lr 0: the weights stay
        sums = torch.stack([parts.diffusion_nll, parts.ar_nll]).double()
        dist.all_reduce(sums)
        yield Observed(float(sums[0]), float(sums[1]), seen.pop(), gradients)
    engine.destroy()


def whole_gradients(engine, ranks: RankLayout) -> dict[str, Tensor]:
    """Every trained parameter's gradient on the CPU, experts of all ranks put together."""
    from deepspeed.utils import safe_get_full_grad

    gradients: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        gradient = safe_get_full_grad(parameter)
        assert gradient is not None, f"{name} has no gradient"
        if is_expert(name):  # each rank of an expert group has its own part, each replica of the group the same
            parts = [torch.empty_like(gradient) for _ in range(ranks.world)]
            dist.all_gather(parts, gradient.contiguous())
            gradient = torch.cat(parts[: ranks.expert_parallel_size])
        gradients[name] = gradient.cpu()
    return gradients


def start_ranks(argv: list[str], count: int, script: str = __file__) -> int:
    """Run a script once per rank; the first failure ends the others."""
    shared = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(count))
    ranks = [
        subprocess.Popen(
            [sys.executable, script, *argv, "--is-rank"],
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
        limits = zip(QUANTITIES, differences, TOLERANCES[args.dtype], strict=False)  # gradients: of mixed coins only
        above = [name for name, difference, limit in limits if not difference <= limit]
        good &= not above
        if ranks.is_main:
            every = norm_differences(seen.grad_square, case.norms[coins], CANCELS[args.dtype])
            furthest = max(every, key=lambda name: every[name]).removeprefix(DECODER)
            numbers = "".join(f"{difference:>15.1e}" for difference in differences)
            numbers += " " * 15 if args.lora and len(differences) < len(QUANTITIES) else ""
            verdict = f"  ABOVE TOLERANCE: {', '.join(above)}" if above else ""
            print(f"{case.directory.name:<16}{coins:<7}{numbers}  {furthest}{fewer}{verdict}", flush=True)
            for name in sorted(every) if args.verbose else []:
                print(f"    {name:<72}{every[name]:>10.1e}")
    return good


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path)
    parser.add_argument("--lora", action="store_true", help="the cases with an adapter, with it")
    parser.add_argument("--images", action="store_true", help="the cases are with images")
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
        file = "lora.safetensors" if args.lora else "case.safetensors"
        directories = sorted(path.parent for path in args.cases.glob(f"*/{file}"))
        if not directories:
            raise UserError(f"{args.cases} holds no case: no */{file} there.")
        cases = [read_case(directory) for directory in directories]
        if without := [case.directory.name for case in cases if args.images and "image_mask" not in case.tensors]:
            raise UserError(f"--images: {', '.join(without)} in {args.cases} has no image_mask.")
        cases = [read_lora(case) for case in cases] if args.lora else cases
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
        columns = QUANTITIES if args.lora else QUANTITIES[:-1]
        print(f"{'case':<16}{'coins':<7}{''.join(f'{name:>15}' for name in columns)}  furthest gradient")
    good = [run_case(case, ranks, args) for case in cases]
    if ranks.is_main:
        print(f"all {len(good)} cases within tolerance" if all(good) else f"{good.count(False)} of {len(good)} FAILED")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
