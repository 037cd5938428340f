"""What data costs: all turns of a chat in one sweep, packed rows, a million rows read.

    python -m tests.benchmarks.conversations turns
    python -m tests.benchmarks.conversations packing FILE.jsonl
    python -m tests.benchmarks.conversations rows [--rows 1000000]

turns: CPU seconds per learned token of five-turn chats, every turn learned: one sequence with five spans, against an
example a turn, by us and by transformers' own training hooks. packing: GSM8K's questions and answers in rows of 2,048
tokens, against micro-batches of four. rows: two-turn chats of 300 bytes, checked and tokenized, against the tokenizer
alone on the text that the template makes of them; and the memory of it.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import psutil
import torch
from transformers import AutoTokenizer

from ds_dgemma.config.run import ObjectiveSection
from ds_dgemma.data.batch import Batch, Example, Span
from ds_dgemma.data.canvas import Cut
from ds_dgemma.data.order import Arrangement, Order
from ds_dgemma.data.rendering import ChatTemplate
from ds_dgemma.data.split import read_split
from ds_dgemma.model.spec import read_spec
from ds_dgemma.objective.collate import collate
from ds_dgemma.objective.corruption import Corruption
from ds_dgemma.tools.tiny import make_tiny
from tests.benchmarks.step import CANVAS, Step, make_model, open_ours, open_transformers
from tests.data.reading import settings

EOS, VOCABULARY = 1, 4096
CHATS, TURNS, PROMPT = 4, 5, 192  # an answer is a canvas
MIB = 2**20
BLOCK = 10_000  # rows that are made at once
WORDS = 19  # of a turn: 300 bytes a row


def options() -> argparse.Namespace:
    """What step.py's variants want."""
    return argparse.Namespace(device="cpu", dtype="float32", experts="expert_parallel", logits_chunk_mib=256)


def chats(spans_per_example: int) -> list[Example]:
    """The same chats, as examples of all their turns or of one turn each."""
    draw, cut, found = np.random.default_rng(7), Cut(10**6, "drop", CANVAS, EOS), []
    for chat in range(CHATS):
        ids = draw.integers(3, VOCABULARY - 3, TURNS * (PROMPT + CANVAS))
        ids[PROMPT + CANVAS - 1 :: PROMPT + CANVAS] = EOS  # so an answer is a canvas
        starts = range(PROMPT, len(ids), PROMPT + CANVAS)
        spans = [Span(start, start + CANVAS, 1.0, turn) for turn, start in enumerate(starts)]
        if spans_per_example == TURNS:
            found.append(cut.example(chat, ids, spans))
        else:
            found += [cut.example(chat, ids[: span.end], [span]) for span in spans]
    return found


def batch_of(examples: Sequence[Example]) -> Batch:
    """All canvases, every second one self-conditioned."""
    corruption = Corruption(ObjectiveSection(canvases_per_example="all"), 0, VOCABULARY)
    batch = collate(corruption, [(example, 0) for example in examples])
    return batch.with_coins(torch.arange(len(batch.canvases)) % 2 == 0)


def seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """Median CPU seconds, a dropped one before."""
    found = []
    for _ in range(1 + repeats):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return statistics.median(found[1:])


def turns(args: argparse.Namespace) -> None:
    """One sweep, an example a turn, transformers' hooks."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), VOCABULARY)
        ours = open_ours(Path(folder), options(), "full")
        theirs: Step = open_transformers(Path(folder), options())
        one_sweep, apart = batch_of(chats(TURNS)), chats(1)
        of_turn = [batch_of(apart[turn::TURNS]) for turn in range(TURNS)]  # documents of one length
        learned = one_sweep.canvas_ids_CL.numel()
        assert learned == sum(batch.canvas_ids_CL.numel() for batch in of_turn)
        spent = {
            "one sequence, five spans": seconds(lambda: ours(one_sweep)),
            "an example a turn": seconds(lambda: ours(batch_of(apart))),
            "transformers, an example a turn": seconds(lambda: [theirs(batch) for batch in of_turn]),
        }
    for name, cpu in spent.items():
        ratio = spent["one sequence, five spans"] / cpu
        print(f"{name}: {1e3 * cpu / learned:.2f} ms CPU per learned token; one sequence / this: {ratio:.2f}")


def packing(args: argparse.Namespace) -> None:
    """Rows of 2,048 tokens, against micro-batches of four."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        make_tiny("text", model, text=args.file)
        tokenizer, spec = AutoTokenizer.from_pretrained(model), read_spec(str(model))
        config = settings(args.file, columns={"prompt": "question", "response": "answer"}, max_length=2048)
        examples = read_split(config, "train", spec, tokenizer, cache=Path(folder, "cache"))
        corruption = Corruption(config.objective, 0, len(tokenizer))
        step, found = open_ours(model, options(), "full"), {}
        for name, rows, arrangement in (("four a micro-batch", 4, Arrangement(0)), ("packed", 1, Arrangement(0, 2048))):
            order = Order(0, examples.lengths_N, examples.sizes, (1.0,), arrangement, 10_000)
            shares = [[item for row in range(rows) for item in order.row(n * rows + row)] for n in range(args.steps)]
            batches = [collate(corruption, [(examples[i], epoch) for i, epoch in share]) for share in shares]
            padded = sum(padded_tokens(batch, None if rows > 1 else 2048) for batch in batches)
            clean = sum(batch.clean_ids_S.numel() for batch in batches)
            step(batches[0])
            cpu = seconds(lambda batches=batches: [step(batch) for batch in batches], repeats=1)
            found[name] = sum(batch.tokens() for batch in batches) / cpu
            print(f"{name}: padding would be {1 - clean / padded:.1%}; {found[name]:.0f} tokens a CPU second")
    print(f"packed / four a micro-batch: {found['packed'] / found['four a micro-batch']:.2f}")


def padded_tokens(batch: Batch, row: int | None) -> int:
    """Clean tokens of a micro-batch whose rows are padded to `row`, or to the longest."""
    return row or max(batch.documents) * len(batch.documents)


def rows(args: argparse.Namespace) -> None:
    """A million rows."""
    with tempfile.TemporaryDirectory() as folder:
        words = [word for word in Path(__file__).read_text().split() if word.isalpha()]
        draw = np.random.default_rng(0)
        file, model = Path(folder, "rows.jsonl"), Path(folder, "model")
        with file.open("w") as out:
            for _ in range(0, args.rows, BLOCK):
                for picked in draw.integers(len(words), size=(BLOCK, 2, WORDS)).tolist():
                    said = [" ".join([words[word] for word in turn]) for turn in picked]
                    out.write(json.dumps({"messages": [message(n, text) for n, text in enumerate(said)]}) + "\n")
        print(f"{args.rows:,} rows of {file.stat().st_size / args.rows:.0f} bytes")
        with Path(folder, "some.jsonl").open("w") as some, file.open() as lines:
            some.writelines(islice(lines, 2 * BLOCK))
        make_tiny("text", model, text=Path(folder, "some.jsonl"))
        tokenizer = AutoTokenizer.from_pretrained(model)

        alone = tokenizer_alone(file, tokenizer)
        peak = Peak()
        began, spent = time.perf_counter(), cpu_seconds()
        examples = read_split(settings(file), "train", read_spec(str(model)), tokenizer, cache=Path(folder, "c"))
        wall, cpu = time.perf_counter() - began, cpu_seconds() - spent
        tokens = examples.sources[0].documents.tokens.nbytes / MIB
        print(f"tokenizer alone: {alone[0]:.1f} s wall, {alone[1]:.1f} s CPU")
        print(f"checked and tokenized: {wall:.1f} s wall, {cpu:.1f} s CPU; {wall / alone[0]:.2f}, {cpu / alone[1]:.2f}")
        print(f"peak memory above the start: {peak.stop() / MIB:.0f} MiB of all processes; tokens {tokens:.0f} MiB")


def message(number: int, text: str) -> dict[str, str]:
    """A turn."""
    return {"role": ("user", "assistant")[number % 2], "content": text}


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def tokenizer_alone(file: Path, tokenizer: Any) -> tuple[float, float]:
    """Wall and CPU seconds for the text that the template makes of all rows, with the tokenizer's own threads."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    wall = cpu = 0.0
    render = ChatTemplate(tokenizer, {}).for_row(None, {})
    with file.open() as lines:
        while texts := [render(json.loads(line)["messages"], False) for line in islice(lines, BLOCK)]:
            began, spent = time.perf_counter(), time.process_time()
            tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
            wall, cpu = wall + time.perf_counter() - began, cpu + time.process_time() - spent
    return wall, cpu


class Peak:
    """The most private memory that this process and its children held above the start."""

    def __init__(self) -> None:
        self._process, self._stop, self._most = psutil.Process(), threading.Event(), 0
        self._start = self._held()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Bytes."""
        self._stop.set()
        self._thread.join()
        return self._most - self._start

    def _held(self) -> int:
        held = 0
        for process in (self._process, *self._process.children(recursive=True)):
            try:
                held += process.memory_full_info().uss
            except psutil.NoSuchProcess:
                continue
        return held

    def _watch(self) -> None:
        while not self._stop.wait(2):  # reading it takes time of its own
            self._most = max(self._most, self._held())


def main() -> None:
    """Run one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    commands.add_parser("turns").set_defaults(run=turns)
    packed = commands.add_parser("packing")
    packed.add_argument("file", type=Path)
    packed.add_argument("--steps", type=int, default=20)
    packed.set_defaults(run=packing)
    many = commands.add_parser("rows")
    many.add_argument("--rows", type=int, default=10**6)
    many.set_defaults(run=rows)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
