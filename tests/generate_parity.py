"""Hold the sampler against what unmodified transformers' `generate()` said, token for token in fp32.

    python tests/generate_parity.py DIR [--ep 2]

DIR holds cases, each a folder with `model/` (a transformers checkpoint), `generate.json` (`torch_manual_seed` and the
settings that `generate()` got) and `generate.safetensors`: `input_ids` [B, S], `expected.sequences` [B, S + new],
`padded_input_ids`, `padded_attention_mask` and `expected.padded_sequences`, prompts of unequal length.

Without --ep: transformers' own experts in one process, as `ds-dgemma evaluate` has them. With it: as training holds the
model, ZeRO-3 and expert parallelism on DeepSpeed, in so many processes that this script starts itself; each answers all
prompts. Exit 1 when a token differs, 2 when the cases cannot be read.
"""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import load_file

from ds_dgemma.checkpoint.load import check_places, materialise, plain
from ds_dgemma.checkpoint.weights import WeightReader
from ds_dgemma.engine.connect import connect
from ds_dgemma.errors import EXIT_USER_ERROR, UserError
from ds_dgemma.evaluation.sampler import Group, Sampler
from ds_dgemma.evaluation.sampler_settings import SamplerSettings, read_settings
from ds_dgemma.model.build import build_stack
from ds_dgemma.model.names import places_of
from ds_dgemma.model.spec import read_spec
from ds_dgemma.model.stack import DiffusionGemmaStack
from ds_dgemma.ranks.layout import RankLayout, disconnect, sum_over_ranks
from tests.parity import open_engine, start_ranks

KINDS = ("", "padded_")


def open_plain(model: Path) -> DiffusionGemmaStack:
    """The stack in fp32 on transformers' own experts."""
    stack, reader = build_stack(read_spec(str(model))), WeightReader(model)
    materialise(stack, reader, check_places(stack, places_of(stack), reader), plain(torch.float32, "cpu"), device="cpu")
    return stack.eval()


def open_sharded(model: Path, ranks: RankLayout) -> DiffusionGemmaStack:
    """The stack as training holds it."""
    args = argparse.Namespace(dtype="float32", stage=3, grouped=False)
    return open_engine(model, ranks, 1, args, None, False).module.model


def run_case(directory: Path, ranks: RankLayout | None) -> bool:
    """Print a line for each kind of prompts; whether all tokens are equal."""
    settings, tensors = (
        json.loads((directory / "generate.json").read_text()),
        load_file(directory / "generate.safetensors"),
    )
    known = {field.name for field in fields(SamplerSettings)}
    model = directory / "model"
    sampler_settings = read_settings(model, {name: value for name, value in settings.items() if name in known})
    stack = open_sharded(model, ranks) if ranks else open_plain(model)
    device = ranks.device if ranks else torch.device("cpu")
    any_rank = (lambda holds: sum_over_ranks([holds], device)[0] > 0) if ranks else bool
    good = True
    for kind in KINDS:
        if (wanted := tensors.get(f"expected.{kind}sequences")) is None:
            continue
        ids = tensors[f"{kind}input_ids"]
        is_real = tensors.get(f"{kind}attention_mask", torch.ones_like(ids)).bool()
        prompts = [row[real].tolist() for row, real in zip(ids, is_real, strict=True)]
        group = Group(prompts, settings["torch_manual_seed"])
        (answers,) = Sampler(stack, sampler_settings, device, any_rank).answer([group])
        equal, total = 0, 0
        for answer, row in zip(answers, wanted[:, ids.shape[1] :].tolist(), strict=True):
            # A row that is stopped is padding from there on, and without a padding token it is nobody's.
            said = answer.tokens + row[len(answer.tokens) :]
            if sampler_settings.pad_id is not None:
                said = answer.tokens + [sampler_settings.pad_id] * (len(row) - len(answer.tokens))
            equal += sum(ours == theirs for ours, theirs in zip(said, row, strict=True))
            total += len(row)
        good &= equal == total
        if ranks is None or ranks.is_main:
            verdict = "" if equal == total else "  DIFFERENT"
            print(
                f"{directory.name:<16}{kind.rstrip('_') or 'plain':<10}{equal} of {total} tokens{verdict}", flush=True
            )
    return good


def main(argv: list[str]) -> int:
    """Compare every case; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path)
    parser.add_argument("--ep", type=int, help="ranks and expert-parallel size")
    parser.add_argument("--is-rank", action="store_true", help=argparse.SUPPRESS)  # started by start_ranks
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        directories = sorted(file.parent for file in args.cases.glob("*/generate.json"))
        if not directories:
            raise UserError(f"{args.cases} holds no case: no */generate.json there.")
        if args.ep and not args.is_rank:
            return start_ranks(argv, args.ep, __file__)
        ranks = RankLayout.from_environment(args.ep) if args.ep else None
        if ranks:
            connect(ranks, timeout_minutes=5)
        good = [run_case(directory, ranks) for directory in directories]
        if ranks:
            disconnect()
        return 0 if all(good) else 1
    except (UserError, OSError, KeyError, ValueError) as error:
        print(f"{type(error).__name__}: {error}" if not isinstance(error, UserError) else error, file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
