"""lm-evaluation-harness and Inspect ask our model and get what `generate` says; skipped without them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ds_dgemma.data.sudoku import write_sudoku
from ds_dgemma.evaluation.answers import answer_prompts
from ds_dgemma.evaluation.open_model import Source, find_model, load_model
from ds_dgemma.evaluation.prompts import message_ids
from ds_dgemma.tools.tiny import make_tiny

ROOT = Path(__file__).resolve().parents[2]
HARNESS = """
task: puzzles
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 20}}
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""
INSPECT = """
from inspect_ai import Task, task
from inspect_ai.dataset import FieldSpec, json_dataset
from inspect_ai.scorer import exact
from inspect_ai.solver import generate

@task
def puzzles():
    fields = FieldSpec(input="question", target="answer")
    return Task(dataset=json_dataset({file!r}, fields), solver=generate(seed=7), scorer=exact())
"""


def write_task(folder: Path, seeds: list[int]) -> Path:
    """A model, and two questions whose answers are what our sampler says to them."""
    make_tiny("sudoku4", folder / "model")
    write_sudoku(4, "test", 2, 0, folder / "puzzles.jsonl")
    rows = [json.loads(line) for line in (folder / "puzzles.jsonl").read_text().splitlines()]
    model = load_model(find_model(Source(str(folder / "model")), {"max_new_tokens": 20}))
    questions = [row["messages"][0]["content"] for row in rows]
    ids = [message_ids(model.found, [{"role": "user", "content": text}], "a question") for text in questions]
    said = [one.text for one in answer_prompts(model, ids, 1, seeds)]
    asked = [{"question": q, "answer": a} for q, a in zip(questions, said, strict=True)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    return folder / "asked.jsonl"


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow
def test_the_harness_gets_our_answers_and_is_refused_likelihoods(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    file = write_task(tmp_path, [3, 4])
    command = [
        "ds_dgemma.frameworks.lm_eval",
        "--model",
        "ds_dgemma",
        "--include_path",
        str(tmp_path),
        "--tasks",
        "puzzles",
    ]
    model = ["--model_args", f"pretrained={tmp_path}/model,seed=3", "--apply_chat_template"]
    task = tmp_path / "puzzles.yaml"
    task.write_text(HARNESS.format(file=file, kind="generate_until", metric="exact_match", more=""))
    done = run(tmp_path, *command, *model, "--output_path", str(tmp_path / "results"))
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = (tmp_path / "results").rglob("results_*.json")
    (found,) = json.loads(results.read_text())["results"].values()
    assert {value for name, value in found.items() if name.startswith("exact_match,")} == {1.0}

    (tmp_path / "asked.jsonl").write_text('{"question": "1", "answer": 0}\n')
    task.write_text(HARNESS.format(file=file, kind="multiple_choice", metric="acc", more='doc_to_choice: ["1", "2"]'))
    refused = run(tmp_path, *command, *model)
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.rstrip().splitlines()[-1].startswith("This task asks for log-likelihoods.")


@pytest.mark.slow
def test_inspect_gets_our_answers(tmp_path: Path) -> None:
    pytest.importorskip("inspect_ai")
    file = write_task(tmp_path, [7, 7])
    (tmp_path / "puzzles.py").write_text(INSPECT.format(file=str(file)))
    words = [
        "eval",
        "puzzles.py",
        "--model",
        f"ds_dgemma/{tmp_path}/model",
        "--log-format",
        "json",
        "--display",
        "plain",
    ]
    done = run(tmp_path, "inspect_ai", *words, "-M", "max_new_tokens=20")
    assert done.returncode == 0, done.stdout + done.stderr
    (log,) = (tmp_path / "logs").glob("*.json")
    report: dict[str, Any] = json.loads(log.read_text())
    assert report["status"] == "success", report.get("error")
    scores = [score["value"] for sample in report["samples"] for score in sample["scores"].values()]
    assert scores == ["C", "C"], report["samples"]


def test_inspect_reads_calls_of_tools() -> None:
    pytest.importorskip("inspect_ai")
    from ds_dgemma.frameworks.inspect import _output

    text = 'I look.<|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:2}<tool_call|>'
    (choice,) = _output("m", text, True, 5, 9, has_tools=True).choices
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert (call.function, call.arguments, call.parse_error) == ("weather", {"city": "Oslo", "days": 2}, None)
    assert (choice.message.text, choice.stop_reason) == ("I look.", "tool_calls")
    (plain,) = _output("m", text, False, 5, 9, has_tools=False).choices
    assert (plain.message.text, plain.stop_reason) == (text, "max_tokens")
