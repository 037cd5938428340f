"""The commands that answer: `evaluate`, `generate`, `chat`, and their options. Imports as in `cli.py`."""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_dgemma.errors import UserError, say

if TYPE_CHECKING:
    from ds_dgemma.evaluation.open_model import Found

SAMPLER = {
    "max_new_tokens": (int, "tokens of an answer, rounded up to whole canvases"),
    "max_denoising_steps": (int, "decoder passes a canvas, at most"),
    "entropy_bound": (float, "summed entropy of the tokens accepted in a step"),
    "t_min": (float, "temperature of the last step"),
    "t_max": (float, "temperature before the first"),
    "stability_threshold": (int, "steps without a change before a canvas may be done"),
    "confidence_threshold": (float, "mean entropy below which it is"),
}
OPTIONS = {  # and the settings of a config that errors call them by
    "model": "model.path",
    "data": "data.train",
    "file": "data.train",
    "columns": "data.columns",
    "ignore": "data.ignore",
}
Number = Callable[[str], Any]
Command = Callable[[argparse.Namespace], None]


def as_typed(command: Command) -> Command:
    """Errors name the options of the command line."""

    @wraps(command)
    def run(args: argparse.Namespace) -> None:
        try:
            command(args)
        except UserError as error:
            text = str(error)
            for option, setting in OPTIONS.items():
                if hasattr(args, option) and (option != "model" or args.model):  # a run's own config names its model
                    text = text.replace(setting, f"--{option}")
            raise UserError(text) from error

    return run


@as_typed
def evaluate(args: argparse.Namespace) -> None:
    """Answer held-out conversations and score the answers."""
    from rich.console import Console

    from ds_dgemma.evaluation.evaluate import evaluate
    from ds_dgemma.evaluation.questions import section_of
    from ds_dgemma.evaluation.report import as_html, as_json, as_markdown, manner_line, report_table

    forms = {".json": as_json, ".md": as_markdown, ".html": as_html}
    for out in args.out:
        if out.is_dir() or out.suffix not in forms:
            raise UserError(f"--out {out}: a file that ends in {', '.join(forms)} was expected.")
        _check_place(out)
    if len(args.task) > 1:
        raise UserError(f"--task {' --task '.join(args.task)}: one at a time. Start the command once for each.")
    columns = dict(zip(("prompt", "response"), args.columns or (), strict=False))
    data = section_of(args.data, {"columns": columns, "ignore": args.ignore})
    report = evaluate(
        _found(args),
        data,
        args.task[0],
        batch_size=args.batch_size,
        limit=args.limit,
        seed=args.seed,
        group_by=args.group_by,
    )
    Console().print(report_table(report))
    print(manner_line(report))
    for out in args.out:
        _write(out, forms[out.suffix](report))


@as_typed
def generate(args: argparse.Namespace) -> None:
    """Answer a prompt, or every conversation of a file."""
    from ds_dgemma.data.messages import BadRow
    from ds_dgemma.data.pictures import place, placed_in
    from ds_dgemma.evaluation.answers import answer_prompts
    from ds_dgemma.evaluation.open_model import load_model
    from ds_dgemma.evaluation.prompts import message_ids
    from ds_dgemma.evaluation.questions import read_prompts

    found = _found(args)
    if args.prompt is not None:
        images = [{"type": "image", "path": file} for file in args.image]
        content = [*images, {"type": "text", "text": args.prompt}] if images else args.prompt
        found = replace(found, images=replace(found.images, allow_urls=True))  # who types an address means it
        try:
            (message,), _ = place([{"role": "user", "content": content}], [])
            ids = [message_ids(found, placed_in([message], Path.cwd()), "--prompt")]
        except BadRow as problem:
            raise UserError(f"--image: {problem}") from problem
        rows: list[dict[str, Any]] = []
    else:
        if args.image:
            raise UserError("--image belongs to --prompt: the rows of --file name their images themselves.")
        rows, ids = read_prompts(args.file, found)
    if args.out is not None:
        if args.prompt is not None or args.out == args.file:
            raise UserError(f"--out {args.out}: belongs to --file, and is another file.")
        _check_place(args.out)
    model = load_model(found)
    watch = _watch(args, model)
    said = answer_prompts(model, ids, args.batch_size, range(args.seed, args.seed + len(ids)), watch)
    if watch is not None:
        watch.close()
    if args.prompt is not None:
        say(said[0].text)
        return
    lines = [
        json.dumps(
            {**row, "answer": one.text, "stopped": one.answer.stopped, "steps": one.answer.steps}, ensure_ascii=False
        )
        for row, one in zip(rows, said, strict=True)
    ]
    if args.out is None:
        say("\n".join(lines))
    else:
        _write(args.out, "\n".join(lines) + "\n")


@as_typed
def chat(args: argparse.Namespace) -> None:
    """Talk with a model; /watch shows canvases, /reset forgets, /quit ends."""
    from ds_dgemma.evaluation.chat import chat
    from ds_dgemma.evaluation.open_model import load_model

    chat(load_model(_found(args)), args.system, args.seed, args.watch)


def add_commands(add: Callable[..., argparse.ArgumentParser], seed: Number, count: Number, step: Number) -> None:
    """Add the commands; `add` makes a command's parser, the others read an option."""
    evaluate_ = add("evaluate", evaluate)
    _add_source(evaluate_, step)
    evaluate_.add_argument("--data", required=True, metavar="SOURCE", help="a file, folder, glob or hub dataset id")
    evaluate_.add_argument("--columns", nargs=2, metavar=("PROMPT", "RESPONSE"), help="as data.columns in a config")
    evaluate_.add_argument("--ignore", action="append", default=[], metavar="KEY", help="as data.ignore")
    evaluate_.add_argument(
        "--task",
        required=True,
        action="append",
        metavar="NAME",
        help="exact_match, number, sudoku, ... or python:FILE:function",
    )
    evaluate_.add_argument("--group-by", metavar="COLUMN", help="report shares for each value of a column")
    evaluate_.add_argument("--limit", type=int, metavar="N", help="score the first N conversations only")
    evaluate_.add_argument(
        "--out", type=Path, action="append", default=[], metavar="F", help="write the report: .json, .md, .html"
    )
    evaluate_.add_argument("--batch-size", type=int, default=64, metavar="N")
    evaluate_.add_argument("--seed", type=seed, default=0)

    generate_ = add("generate", generate)
    _add_source(generate_, step)
    asked = generate_.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", metavar="TEXT")
    asked.add_argument("--file", type=Path, metavar="F.jsonl", help="conversations that end with the user")
    generate_.add_argument(
        "--image", action="append", default=[], metavar="F", help="stands before --prompt; several in order"
    )
    generate_.add_argument(
        "--out", type=Path, metavar="F.jsonl", help="its rows with their answers; else they are printed"
    )
    generate_.add_argument("--watch", action="store_true", help="show the canvas of the first prompt, step by step")
    generate_.add_argument("--batch-size", type=count, default=64, metavar="N")
    generate_.add_argument("--seed", type=seed, default=0)

    chat_ = add("chat", chat)
    _add_source(chat_, step)
    chat_.add_argument("--system", metavar="TEXT", help="the system's turn")
    chat_.add_argument("--watch", action="store_true", help="begin with /watch on")
    chat_.add_argument("--seed", type=seed, default=0)


def _add_source(parser: argparse.ArgumentParser, step: Number) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="DIR", help="transformers checkpoint or hub id")
    source.add_argument("--run", type=Path, metavar="DIR", help="run directory, nothing exported")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of the hub id")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="PEFT adapter of the model")
    parser.add_argument(
        "--step", type=step, metavar="N", help="of the run; absent: the newest; best: by the run's checkpoint.best_by"
    )
    sampler = parser.add_argument_group("sampler", "what is left out is the checkpoint's generation_config.json's")
    for name, (kind, meaning) in SAMPLER.items():
        sampler.add_argument(
            f"--{name.replace('_', '-')}", type=kind, metavar="N" if kind is int else "X", help=meaning
        )


def _found(args: argparse.Namespace) -> "Found":
    from ds_dgemma.config.recorded import CONFIG
    from ds_dgemma.evaluation.open_model import Source, find_model

    for option in ("adapter", "revision") if args.run else ("step",):
        if getattr(args, option) is not None:
            raise UserError(f"--{option} belongs to --{'model' if args.run else 'run'}. Leave it out.")
    if args.model is not None and (Path(args.model) / CONFIG).is_file():
        raise UserError(f"--model {args.model}: this is a run's directory. Say --run {args.model}.")
    source = Source(args.model, args.revision, args.adapter, args.run, args.step)
    return find_model(source, {name: getattr(args, name) for name in SAMPLER})


def _watch(args: argparse.Namespace, model: Any) -> Any:
    if not args.watch:
        return None
    from ds_dgemma.evaluation.watch import Watch

    return Watch(model.found.model.tokenizer)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror}). Name another file.") from error


def _check_place(out: Path) -> None:
    """Refuse a place that cannot be written, before minutes are spent on answers."""
    with _writing(out):
        out.open("a").close()


def _write(out: Path, text: str) -> None:
    with _writing(out):
        out.write_text(text, encoding="utf-8")
