"""`ds-dgemma COMMAND`: all but training, which is `deepspeed --module ds_dgemma.train --config C.yaml`.

One short function per command: it reads arguments, calls and prints. What it calls is imported inside it, so
`--help` and a mistyped command answer at once. Exit codes: 0; 2 for a mistake that the message tells how to
mend; 130 for Ctrl-C.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ds_dgemma.cli_answers import add_commands, as_typed
from ds_dgemma.errors import EXIT_USER_ERROR, UserError

if TYPE_CHECKING:
    from ds_dgemma.checkpoint.hf_weights import Layout

EXIT_DOES_NOT_FIT = 1
EXIT_INTERRUPTED = 130
EXIT_UNREAD = 141  # as the shell tells SIGPIPE


def make_tiny(args: argparse.Namespace) -> None:
    """Make a tiny checkpoint of random weights, with a tokenizer."""
    from ds_dgemma.tools.tiny import make_tiny

    tokens = make_tiny(args.preset, args.out, args.text, args.seed, args.vocab_size, args.force)
    few = " (the text has no more)" if args.vocab_size and tokens < args.vocab_size else ""
    print(f"{args.out}: a {args.preset} checkpoint of random weights, {tokens:,} tokens{few}")


def make_sudoku(args: argparse.Namespace) -> None:
    """Make Sudoku puzzles with one solution each, as JSONL."""
    from ds_dgemma.data.sudoku import write_sudoku

    write_sudoku(args.size, args.split, args.count, args.seed, args.out, args.symbols)
    print(f"{args.out}: {args.count} puzzles of {args.split}, {args.size}x{args.size}")


def make_shapes(args: argparse.Namespace) -> None:
    """Make pictures of coloured shapes, with questions and answers as JSONL."""
    from ds_dgemma.data.shapes import write_shapes

    write_shapes(args.split, args.count, args.seed, args.out)
    print(f"{args.out}: {args.count} pictures of {args.split}")


def plan(args: argparse.Namespace) -> int:
    """Tell the memory, arithmetic and traffic of a run before it is started, and whether it fits (else exit code 1)."""
    from rich.console import Console

    from ds_dgemma.config.faults import doubts
    from ds_dgemma.config.file import load_config
    from ds_dgemma.plan.plan import Limits, make_plan
    from ds_dgemma.plan.report import as_dict, tables

    limits = Limits(args.gpu_memory, args.host_memory, args.gpus_per_node)
    config = load_config(args.config, args.set)
    planned = make_plan(config, args.gpus, limits, args.length, args.images)
    for warning in doubts(config, planned.inventory.text.max_position_embeddings):
        print(f"warning: {warning}", file=sys.stderr)
    if args.json:
        print(json.dumps(as_dict(planned, args.tflops), indent=2))
    else:
        Console().print(tables(planned, args.tflops))
    return EXIT_DOES_NOT_FIT if planned.problems else 0


def inspect(args: argparse.Namespace) -> None:
    """Show what the model will see of a run's data: roles, canvases, noise; what is cut, dropped or not read."""
    from rich.console import Console

    from ds_dgemma.config.file import load_config
    from ds_dgemma.inspection.inspect import inspect

    inspect(load_config(args.config, args.set), args.split, args.rows, args.html, args.json, Console())


def export(args: argparse.Namespace) -> None:
    """Write a run's checkpoint as a transformers directory, or a LoRA run's as an adapter."""
    from ds_dgemma.checkpoint.export import export_run

    export_run(args.run, args.out, args.step, args.dtype, args.format, _layout(args))
    print(f"{args.out}: exported from {args.run}")


@as_typed
def merge(args: argparse.Namespace) -> None:
    """Add a PEFT adapter to the weights of its model, once, and write the result as a transformers directory."""
    from ds_dgemma.checkpoint.export import merge_adapter

    merge_adapter(args.model, args.adapter, args.out, args.dtype, args.revision, _layout(args))
    print(f"{args.out}: {args.model} with {args.adapter}")


def replay(args: argparse.Namespace) -> None:
    """Compute a step again that was skipped for NaN or infinity, alone, and tell which examples are to blame."""
    from ds_dgemma.run.replay import replay

    replay(args.file, args.checkpoint, args.model)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as after training: the process group's threads can abort what is finished


def plot(args: argparse.Namespace) -> None:
    """Draw the loss curves of one or more runs as PNG or HTML."""
    from ds_dgemma.tracking.plots import plot_runs

    print(plot_runs(args.runs, args.out))


def config_reference(args: argparse.Namespace) -> None:
    """Print every setting of a run's YAML, as Markdown."""
    from ds_dgemma.config.schema import reference_markdown

    print(reference_markdown())


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit code."""
    args = parser().parse_args(argv)
    # transformers loads DeepSpeed where it is installed; its accelerator warning would land in our stdout
    logging.getLogger("DeepSpeed").addFilter(lambda log: log.levelno >= logging.ERROR)
    try:
        return args.command(args) or 0
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # who read what is printed has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python's own flush at the end would fail again
        return EXIT_UNREAD


def parser() -> argparse.ArgumentParser:
    """Every command with its arguments."""
    parser = argparse.ArgumentParser(prog="ds-dgemma", description="Fine-tune DiffusionGemma with DeepSpeed.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    _add_makers(commands)
    _add_inspect(commands)
    _add_plan(commands)
    _add_exports(commands)
    add_commands(partial(_add, commands), _seed, _count, _step)

    plot_ = _add(commands, "plot", plot)
    plot_.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory")
    plot_.add_argument("--out", type=Path, metavar="F", help="a .png or .html file")

    replay_ = _add(commands, "replay", replay)
    replay_.add_argument("file", type=Path, metavar="FILE", help="RUN/replay/step-NNNNNN.json")
    weights = replay_.add_mutually_exclusive_group()
    weights.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="whose weights; the run's newest not after the step when absent"
    )
    weights.add_argument("--model", action="store_true", help="the weights that the run started from")

    _add(commands, "config-reference", config_reference)
    return parser


def _add_makers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    tiny = _add(commands, "make-tiny", make_tiny)
    tiny.add_argument("--preset", choices=["sudoku4", "sudoku9", "shapes", "text"], required=True)
    tiny.add_argument("--out", type=Path, required=True, metavar="DIR")
    tiny.add_argument("--text", type=Path, metavar="FILE", help="preset text: JSONL or text to train the tokenizer on")
    tiny.add_argument("--vocab-size", type=int, metavar="N", help="preset text: tokens, image tokens included (4096)")
    tiny.add_argument("--seed", type=_seed, default=0)
    tiny.add_argument("--force", action="store_true", help="replace DIR")

    sudoku = _add(commands, "make-sudoku", make_sudoku)
    sudoku.add_argument("--size", type=int, choices=[4, 9], default=4)
    sudoku.add_argument("--split", choices=["train", "test"], required=True)
    sudoku.add_argument("--count", type=int, required=True, metavar="N")
    sudoku.add_argument("--symbols", choices=["digits", "letters"], default="digits")
    sudoku.add_argument("--seed", type=_seed, default=0)
    sudoku.add_argument("--out", type=Path, required=True, metavar="F.jsonl")

    shapes = _add(commands, "make-shapes", make_shapes)
    shapes.add_argument("--split", choices=["train", "test"], required=True)
    shapes.add_argument("--count", type=int, required=True, metavar="N")
    shapes.add_argument("--seed", type=_seed, default=0)
    shapes.add_argument("--out", type=Path, required=True, metavar="F.jsonl", help="the pictures go to a folder F")


def _add_inspect(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    inspect_ = _add(commands, "inspect", inspect)
    inspect_.add_argument("--config", type=Path, required=True, metavar="YAML", help="the run's config")
    inspect_.add_argument("--set", action="append", default=[], metavar="a.b=value", help="override a setting")
    inspect_.add_argument("--split", choices=["train", "validation"], default="train")
    inspect_.add_argument("--rows", type=_count, metavar="N", help="sequences that are shown (3; in --json all)")
    inspect_.add_argument("--html", type=Path, metavar="F", help="write a page that needs nothing beside it")
    inspect_.add_argument("--json", type=Path, metavar="F", help="write an object a sequence, one a line")


def _add_exports(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    export_ = _add(commands, "export", export)
    export_.add_argument("--run", type=Path, required=True, metavar="DIR", help="run directory")
    export_.add_argument(
        "--step", type=_step, metavar="N", help="absent: the newest; best: by the run's checkpoint.best_by"
    )
    export_.add_argument("--out", type=Path, required=True, metavar="DIR")
    _add_layout(export_)
    export_.add_argument(
        "--format",
        choices=["peft", "merged"],
        help="of a LoRA run: adapter for PEFT (default), or the model with it added",
    )

    merge_ = _add(commands, "merge", merge)
    _add_model(merge_)
    merge_.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="PEFT adapter directory")
    merge_.add_argument("--out", type=Path, required=True, metavar="DIR")
    _add_layout(merge_)


def _add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    plan_ = _add(commands, "plan", plan)
    plan_.add_argument("--config", type=Path, required=True, metavar="YAML", help="the run's config")
    plan_.add_argument("--set", action="append", default=[], metavar="a.b=value", help="override a setting")
    plan_.add_argument("--gpus", type=_above_zero(int, most=10**6), default=8, metavar="N", help="in all (8)")
    plan_.add_argument(
        "--gpu-memory", type=_above_zero(float), default=79.0, metavar="GIB", help="of one GPU (79, H100)"
    )
    plan_.add_argument(
        "--host-memory", type=_above_zero(float), metavar="GIB", help="of one node; not judged when absent"
    )
    plan_.add_argument("--gpus-per-node", type=_above_zero(int), default=8, metavar="N", help="(8)")
    plan_.add_argument(
        "--length", type=_above_zero(int, most=10**7), metavar="N", help="tokens of an example (data.max_length)"
    )
    plan_.add_argument("--images", type=_above_zero(int, most=1000), default=0, metavar="N", help="in each example (0)")
    plan_.add_argument(
        "--tflops",
        type=_above_zero(float),
        default=250.0,
        metavar="X",
        help="that a GPU reaches (250, H100 at a quarter)",
    )
    plan_.add_argument("--json", action="store_true", help="every figure, in bytes and seconds")


def _above_zero(kind: type, most: float = float("inf")) -> Callable[[str], Any]:
    """Read a number above zero, for argparse."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value <= most or value == float("inf"):
            bound = "" if most == float("inf") else f" and at most {most:g}"
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r}, expected {what} above 0{bound}")
        return value

    return read


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    command: Callable[[argparse.Namespace], int | None],
) -> argparse.ArgumentParser:
    """Add a command; its docstring is its help."""
    parser = commands.add_parser(name, help=command.__doc__, description=command.__doc__)
    parser.set_defaults(command=command)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    """The model that a command starts from."""
    parser.add_argument("--model", required=True, metavar="DIR", help="transformers checkpoint or hub id")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of the hub id")


def _add_layout(parser: argparse.ArgumentParser) -> None:
    """How a command that writes a model lays its weights out."""
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="auto: bf16 for what a bf16 run trained, else as the model had it",
    )
    parser.add_argument("--shard-size", type=_gigabytes, default="5", metavar="GB", help="largest weights file (5)")
    parser.add_argument(
        "--workers", type=_count, default=1, metavar="N", help="files written at once, each in memory meanwhile (1)"
    )


def _gigabytes(text: str) -> int:
    """Parse GB as bytes."""
    try:
        size = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text} is no size; a number of GB was expected, 5 or 0.5")
    return size


def _count(text: str) -> int:
    """Parse a positive whole number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no count; a whole number from 1 was expected")
    return int(text)


def _layout(args: argparse.Namespace) -> "Layout":
    from ds_dgemma.checkpoint.hf_weights import Layout

    return Layout(shard_bytes=args.shard_size, workers=args.workers)


def _step(text: str) -> int | Literal["best"]:
    """Parse a checkpoint's step."""
    if text == "best":
        return "best"
    return _count(text)


def _seed(text: str) -> int:
    """A seed that every generator takes."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text}: from 0 to 2**63 - 1")
    return value
