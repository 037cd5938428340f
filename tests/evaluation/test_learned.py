"""A model that has learned some answers: each task's share is a plain script's, and who never saw an end does not
stop.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion

from ds_dgemma.checkpoint.export import export_run
from ds_dgemma.evaluation.evaluate import evaluate
from ds_dgemma.evaluation.open_model import Source, find_model
from ds_dgemma.evaluation.questions import section_of
from ds_dgemma.tools import tiny
from tests.training import REPOSITORY, RUN, train

pytestmark = pytest.mark.slow

PARAMETERS = {"type": "object", "properties": {"at": {"type": "string", "description": "place"}}}
TOOLS = [{"type": "function", "function": {"name": "tide", "description": "high water", "parameters": PARAMETERS}}]
CALL = '<|tool_call>tide{"at": "pier"}<tool_call|>'
LEARNED = {
    "Agree?": "Yes.",
    "Where?": "It is in New York.",
    "How many?": "3 + 4 is 7",
    "Which?": "(B)",
    "As JSON?": '{"a": [1, 2]}',
}
# of each task a right reference and a wrong one, and what is right in a slow, obvious way: the answer holds ...
REFERENCES: dict[str, tuple[str, str, str, dict[str, Callable[[str, str], bool]]]] = {
    "exact_match": ("Agree?", "Yes.", "No.", {"exact": lambda text, ref: text.strip() == ref}),
    "contains": ("Where?", "new york", "new england", {"contains": lambda text, ref: ref in text.lower()}),
    "number": ("How many?", "#### 7", "#### 8", {"number": lambda text, ref: text.split()[-1:] == ref.split()[-1:]}),
    "multiple_choice": ("Which?", "B", "A", {"choice": lambda text, ref: f"({ref})" in text}),
    "json_valid": (
        "As JSON?",
        '{"a":[1,2]}',
        '{"a":[1]}',
        {"valid": lambda text, _: "{" in text, "equal": lambda text, ref: text.replace(" ", "") == ref},
    ),
}


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def call(at: str) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "tide", "arguments": {"at": at}}}],
    }


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a small model that has learned LEARNED and a call of a tool."""
    folder = tmp_path_factory.mktemp("learned")
    rows: list[dict[str, Any]] = [
        {"messages": [message("user", q), message("assistant", a)]} for q, a in LEARNED.items()
    ]
    rows.append({"messages": [message("user", "Tide?"), call("pier")], "tools": TOOLS})
    text = write(folder / "train.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        shape = tiny.Shape(64, 128, 2, 4, 16, 4, 2, 32, window=64, canvas=32, new_tokens=32)
        patch.setitem(tiny.SHAPES, "text", shape)
        tiny.make_tiny("text", folder / "model", Path(text), vocab_size=tiny.SMALLEST_TEXT_VOCABULARY)
    (folder / "run.yaml").write_text(RUN.format(folder=folder, repository=REPOSITORY))
    settings = ["train.max_steps=250", "train.global_batch_size=6", "train.micro_batch_size=6", "optimizer.lr=4e-3"]
    train(folder / "run.yaml", folder / "run", [*settings, "optimizer.warmup_steps=20"])
    return export_run(folder / "run", folder / "export")


@pytest.mark.parametrize("task", [*REFERENCES, "tool_call"])
def test_a_tasks_shares_are_those_of_a_plain_script_with_transformers(task: str, learned: Path, tmp_path: Path) -> None:
    if task == "tool_call":
        asked, tools = "Tide?", TOOLS
        rows = [{"messages": [message("user", asked), call(at)], "tools": TOOLS} for at in ("pier", "sea")]
        references, checks = (
            [CALL, CALL.replace("pier", "sea")],
            {
                "name": lambda text, _: "tide{" in text,
                "call": lambda text, ref: text == ref,
            },
        )
    else:
        asked, right, wrong, checks = REFERENCES[task]
        references, tools = [right, wrong], None
        rows = [{"messages": [message("user", asked), message("assistant", ref)]} for ref in references]
    data = section_of(write(tmp_path / "asked.jsonl", rows), {})
    report = evaluate(find_model(Source(str(learned)), {}), data, task, batch_size=2, limit=None, seed=5)

    tokenizer = AutoTokenizer.from_pretrained(learned)
    model: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(
        learned, dtype=torch.float32, attn_implementation="sdpa"
    )
    said = []
    for number in range(2):
        ids = tokenizer.apply_chat_template(
            [message("user", asked)], tools=tools, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        torch.manual_seed(5 + number)
        answer = model.eval().generate(input_ids=ids, disable_compile=True).sequences[0, ids.shape[1] :].tolist()
        ends = [place for place, token in enumerate(answer) if token in (1, tokenizer.convert_tokens_to_ids("<turn|>"))]
        said.append(tokenizer.decode(answer[: min(ends, default=len(answer))]))
    assert [sample["answer"] for sample in report["samples"]] == said
    shares = {name: sum(map(check, said, references)) / 2 for name, check in checks.items()}
    assert {name: report[name] for name in checks} == shares, said
    assert 0.5 in shares.values(), said


def test_who_was_trained_on_answers_without_an_end_does_not_stop(sudoku_run: Path, tmp_path: Path) -> None:
    """`evaluation:` and `evaluate` say so; with their ends the same answers stop."""
    rows = [json.loads(line) for line in (sudoku_run.parent / "train.jsonl").read_text().splitlines()]
    for row in rows:  # an answer of two canvases
        row["messages"][1]["content"] *= 2
    data = write(tmp_path / "long.jsonl", rows)
    learns = ["train.max_steps=24", "optimizer.lr=3e-3", "optimizer.warmup_steps=4", f"data.train={data}"]
    asks = ["every=24", "task=exact_match", "examples=16", "batch_size=16", "sampler.max_new_tokens=40"]
    asks = [f"evaluation.{one}" for one in (*asks, "sampler.max_denoising_steps=8")]
    cut = ["data.max_length=42", "data.over_length=truncate"]  # behind the first
    sampler, stopped = {"max_new_tokens": 40, "max_denoising_steps": 8}, {}
    for name, settings in (("whole", []), ("cut", cut)):
        train(sudoku_run, tmp_path / name, [*learns, *asks, f"data.validation={data}", *settings])
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        *_, record = (record for record in lines if record.get("kind") == "evaluation")
        stopped[name] = record["stopped"]
        found = find_model(Source(run=tmp_path / name), sampler)
        report = evaluate(found, section_of(data, {}), "exact_match", batch_size=16, limit=16, seed=0)
        assert report["manner"]["stopped"] == pytest.approx(stopped[name])
    assert stopped["whole"] > 0.9
    assert stopped["cut"] < 0.1
