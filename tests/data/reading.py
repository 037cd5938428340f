"""A split of data made on the spot, as training reads it."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ds_dgemma.config.run import RunConfig
from ds_dgemma.data.examples import ExampleSet
from ds_dgemma.data.split import read_split, read_training
from ds_dgemma.data.streaming import StreamedExamples

CANVAS = 8
SPEC: Any = SimpleNamespace(canvas_length=CANVAS, image_token_id=None, boi_token_id=None, eoi_token_id=None)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(*turns: str) -> dict[str, Any]:
    """A row of turns, the user's first."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]}


def chats(count: int) -> list[dict[str, Any]]:
    return [chat(f"question {row}", "x" * (row + 1)) for row in range(count)]


def settings(train: Any, batch: int = 8, seed: int = 5, **data: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"dir": "run"},
            "model": {"path": "model"},
            "data": {"train": train if isinstance(train, list) else str(train), **data},
            "train": {"max_steps": 1, "global_batch_size": batch, "micro_batch_size": 2},
            "deepspeed": "ds.json",
            "seed": seed,
        }
    )


def read(config: RunConfig, tokenizer: Any, cache: Path) -> ExampleSet:
    return read_split(config, "train", SPEC, tokenizer, cache=cache)


def read_stream(config: RunConfig, tokenizer: Any) -> StreamedExamples:
    stream = read_training(config, SPEC, tokenizer, shows=False)
    assert isinstance(stream, StreamedExamples)
    return stream
