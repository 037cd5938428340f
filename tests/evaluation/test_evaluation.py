"""Scores are right, easy puzzles cannot hide hard ones, and answers belong to their prompts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion

from ds_dgemma import cli
from ds_dgemma.checkpoint.export import merge_adapter
from ds_dgemma.data.formats import Conversation
from ds_dgemma.data.sudoku import write_sudoku
from ds_dgemma.errors import UserError
from ds_dgemma.evaluation.answers import answer_prompts
from ds_dgemma.evaluation.evaluate import evaluate
from ds_dgemma.evaluation.open_model import OpenModel, Source, find_model, load_model
from ds_dgemma.evaluation.prompts import message_ids
from ds_dgemma.evaluation.questions import Question, section_of
from ds_dgemma.evaluation.report import as_html, as_markdown, report_table
from ds_dgemma.evaluation.scores import Score, summarise
from ds_dgemma.evaluation.tasks import find_task
from ds_dgemma.tools.tiny import make_tiny
from tests.reference.adapters import write_random_adapter

SOLUTION = "1234341221434321"
PUZZLE = "12..34..2...43.."  # 7 clues, 9 blanks


def question(prompt: str, reference: str, **message: Any) -> Question:
    """A question of one turn."""
    answer = {"role": "assistant", "content": reference, **message}
    messages = [{"role": "user", "content": prompt}]
    return Question("here", {"note": "n"}, messages, answer, Conversation([*messages, answer], [None, None]))


def right(task: str, asked: Question, answer: str) -> dict[str, float]:
    return {measure: got / of for measure, (got, of) in find_task(task)(asked, answer).right.items()}


def opened(path: str | Path, adapter: Path | None = None, **settings: Any) -> OpenModel:
    return load_model(find_model(Source(str(path), adapter=adapter), settings))


def texts(model: OpenModel, prompts: list[list[int]], batch_size: int = 16, seed: int = 0) -> list[str]:
    return [said.text for said in answer_prompts(model, prompts, batch_size, range(seed, seed + len(prompts)))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("model") / "sudoku4"
    make_tiny("sudoku4", out)
    settings = json.loads((out / "generation_config.json").read_text())
    (out / "generation_config.json").write_text(json.dumps({**settings, "max_denoising_steps": 2}))
    return str(out)


@pytest.mark.parametrize(
    ("answer", "solved", "cells", "blank_cells"),
    [
        (SOLUTION, 1, 16, 9),
        ("1234341221434312", 0, 14, 7),  # two blanks swapped
        ("2134341221434321", 0, 14, 9),  # a clue overwritten
        ("2143432112343412", 0, 0, 0),  # a valid grid, of another puzzle
        (SOLUTION[:15], 0, 15, 8),
        (SOLUTION + "1", 0, 16, 9),
        (PUZZLE, 0, 7, 0),
        ("", 0, 0, 0),
        ("<|turn>1", 0, 0, 0),
    ],
)
def test_a_sudoku_is_solved_only_whole_valid_and_with_its_clues(
    answer: str, solved: int, cells: int, blank_cells: int
) -> None:
    score = find_task("sudoku")(question(PUZZLE, SOLUTION), answer)
    assert score.right == {"solved": (solved, 1), "cells": (cells, 16), "blank_cells": (blank_cells, 9)}
    assert score.group == {"blanks": 9, "clues": 7}


def test_another_valid_grid_that_keeps_the_clues_is_solved_and_letters_do_as_well() -> None:
    letters = str.maketrans("1234", "ACFI")
    in_letters = SOLUTION.translate(letters)
    for reference, answer, solved in (
        (SOLUTION, "2143432112343412", 1),
        (in_letters, "2143432112343412", 0),
        (in_letters, in_letters, 1),
    ):
        assert right("sudoku", question("." * 16, reference), answer)["solved"] == solved


def test_shares_are_of_all_examples_and_of_each_number_of_blanks() -> None:
    easy, hard = "123434122143432.", "12.............."
    answers = [(easy, SOLUTION), (easy, SOLUTION), (easy, SOLUTION), (hard, SOLUTION), (hard, "")]
    report = summarise(find_task("sudoku")(question(p, SOLUTION), answer) for p, answer in answers)
    assert (report["examples"], report["solved"], report["cells"]) == (5, 0.8, 0.8)
    assert report["blank_cells"] == 17 / 31
    assert report["groups"] == [
        {"blanks": 1, "clues": 15, "examples": 3, "solved": 1.0, "cells": 1.0, "blank_cells": 1.0},
        {"blanks": 14, "clues": 2, "examples": 2, "solved": 0.5, "cells": 0.5, "blank_cells": 0.5},
    ]


@pytest.mark.parametrize(
    ("task", "asked", "answer", "wanted"),
    [
        ("exact_match", question("q", "Yes."), " Yes.\n", {"exact": 1}),
        ("exact_match", question("q", "Yes."), "yes.", {"exact": 0}),
        ("contains", question("q", "New  York"), "It is new york.", {"contains": 1}),
        ("number", question("q", "48/2 = 24\n#### 1,072"), "So 1072.0", {"number": 1}),
        ("number", question("q", "#### -5"), "it is 10-5", {"number": 0}),
        ("number", question("q", "#### 5"), "it is 10-5", {"number": 1}),
        ("number", question("q", "#### 5"), "none", {"number": 0}),
        ("multiple_choice", question("q", "B"), "The answer is (b).", {"choice": 1}),
        ("multiple_choice", question("q", "B"), "A guess: B) red", {"choice": 1}),
        ("multiple_choice", question("q", "(C)"), "C", {"choice": 1}),
        ("multiple_choice", question("q", "B"), "I think B.", {"choice": 1}),
        ("multiple_choice", question("q", "C"), "The answer is a bit unclear. C", {"choice": 1}),
        ("number", question("q", "#### -1,000"), "\N{MINUS SIGN}$1000", {"number": 1}),
        ("json_valid", question("q", "1"), "true", {"valid": 1, "equal": 0}),
        ("json_valid", question("q", "some"), "NaN", {"valid": 0}),
        ("json_valid", question("q", '{"a": 1}'), '```json\n{"a": 1}\n```', {"valid": 1, "equal": 1}),
        ("json_valid", question("q", '{"a": 1}'), '{"a": 2}', {"valid": 1, "equal": 0}),
        ("json_valid", question("q", "some"), "{", {"valid": 0}),
        (
            "tool_call",
            question("q", "", tool_calls=[{"function": {"name": "tide", "arguments": {"at": "pier", "n": 2}}}]),
            '<|tool_call>call:tide{at:<|"|>pier<|"|>,n:2}<tool_call|>',
            {"name": 1, "call": 1},
        ),
        (
            "tool_call",
            question("q", "", tool_calls=[{"function": {"name": "tide", "arguments": {"at": "pier"}}}]),
            '<|tool_call>tide{"at": "sea"}<tool_call|>',
            {"name": 1, "call": 0},
        ),
    ],
)
def test_a_task_says_what_is_right(task: str, asked: Question, answer: str, wanted: dict[str, int]) -> None:
    assert right(task, asked, answer) == wanted


def test_a_users_function_is_a_task(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "def noted(row, answer):\n    return {'half': 0.5, 'note': row['note'] in answer}\n"
    )
    assert right(f"python:{tmp_path}/own.py:noted", question("q", "a"), "an n") == {"half": 0.5, "note": 1}
    for name, said in (
        ("own.py:absent", "has no function absent"),
        ("absent.py:f", "no file"),
        ("own.py", "no function"),
    ):
        with pytest.raises(UserError, match=said):
            find_task(f"python:{tmp_path}/{name}")


def test_an_answer_depends_on_its_prompt_and_seed_alone_and_ends_at_the_stop(model: str) -> None:
    loaded = opened(model)
    short, long, other_long = [2, 3, 9], [2, 3, 10, 11, 12], [2, 3, 12, 11, 10]
    together = texts(loaded, [long, short, other_long, short], batch_size=8)
    assert together == texts(loaded, [long, short, other_long, short], batch_size=1)
    assert together[1] != together[3]  # the seeds are others
    assert texts(loaded, [short], seed=3) == [together[3]]
    answers = texts(loaded, [short] * 32, batch_size=32)
    assert not any(stop in answer for answer in answers for stop in ("<eos>", "<turn|>"))
    assert len({len(answer) for answer in answers}) > 1  # cut where they ended, not at the canvas


def run_evaluation(model: str, data: str, task: str = "sudoku", batch_size: int = 8, **more: Any) -> dict[str, Any]:
    found = find_model(Source(model), {})
    options = {"limit": None, "seed": 3, "group_by": None, **more}
    return evaluate(found, section_of(data, {}), task, batch_size=batch_size, **options)


def test_a_report_is_repeatable_and_equals_a_plain_script_with_transformers(tmp_path: Path, model: str) -> None:
    write_sudoku(4, "test", 12, 0, tmp_path / "test.jsonl")
    data = str(tmp_path / "test.jsonl")
    reports = [run_evaluation(model, data, batch_size=size, limit=10) for size in (5, 10)]
    for report in reports:
        assert report["manner"].pop("seconds") > 0
    assert reports[0] == reports[1]
    assert reports[0]["examples"] == sum(group["examples"] for group in reports[0]["groups"]) == 10

    theirs: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(
        model, dtype=torch.float32, attn_implementation="sdpa"
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    cells = stopped = 0
    for number, line in enumerate(Path(data).read_text().splitlines()[:10]):
        *prompt, reference = json.loads(line)["messages"]
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        torch.manual_seed(3 + number)
        said = theirs.eval().generate(input_ids=ids["input_ids"], disable_compile=True).sequences[0]
        text = tokenizer.decode(said[ids["input_ids"].shape[1] :])
        ended = min((place for stop in ("<eos>", "<turn|>") if (place := text.find(stop)) >= 0), default=len(text))
        cells += sum(a == b for a, b in zip(text[:ended], reference["content"], strict=False))
        stopped += ended < len(text)
    assert reports[0]["cells"] == cells / 160
    assert reports[0]["manner"]["stopped"] == stopped / 10


def test_shares_are_reported_by_any_column_and_without_groups() -> None:
    scores = [Score({"exact": (n % 2, 1)}, {"level": level}) for n, level in enumerate(("b", 10, 9, 10))]
    assert [group["level"] for group in summarise(scores)["groups"]] == [9, 10, "b"]
    plain = {"model": "m", "data": "d", **summarise([Score({"exact": (1, 1)})]), "seed": 0}
    for report in (plain, {"model": "m", "data": "d", **summarise(scores)}):
        table = report_table(report)
        assert len({len(column._cells) for column in table.columns}) == 1
    assert [str(column.header) for column in report_table(plain).columns] == ["", "examples", "exact"]
    some = summarise([Score({"valid": (1, 1), "equal": (1, 1)}, {"of": "[b]"}), Score({"valid": (0, 1)}, {"of": 2.0})])
    assert (some["valid"], some["equal"], [group["equal"] for group in some["groups"]]) == (0.5, 1.0, [None, 1.0])
    cells = [
        list(map(str, column._cells)) for column in report_table({"model": "m", "data": "d", **some, "seed": 0}).columns
    ]
    assert cells == [["2.0", "[b]", "all"], ["1", "1", "2"], ["0.0%", "100.0%", "50.0%"], ["", "100.0%", "100.0%"]]
    manner = dict.fromkeys(("stopped", "length_to_reference", "steps_per_canvas", "tokens_per_forward", "seconds"), 0.5)
    sample = {"where": "f:1", "reference": "<b>", "answer": "a|b", "exact": "0 of 1"}
    written = {
        **report,
        "manner": manner,
        "task": "exact_match",
        "seed": 0,
        "sampler": {"t_min": 0.4},
        "samples": [sample],
    }
    assert "| b | 1 | 0.0% |" in as_markdown(written)
    assert "&lt;b&gt;" in (page := as_html(written))
    assert "t_min 0.4" in page


def test_what_cannot_be_evaluated_is_refused_by_name(tmp_path: Path, model: str) -> None:
    write_sudoku(4, "test", 3, 0, tmp_path / "test.jsonl")
    data = str(tmp_path / "test.jsonl")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (tmp_path / "chat.jsonl").write_text(Path(data).read_text() + json.dumps({"messages": chat}) + "\n")
    refused = [
        (model, str(tmp_path / "chat.jsonl"), {}, r"chat\.jsonl:4: not a Sudoku record"),
        (model, str(tmp_path / "absent.jsonl"), {}, r"absent\.jsonl"),
        (model, data, {"task": "sudokus"}, "Did you mean sudoku"),
        (model, data, {"task": "tool_call"}, "the reference calls no tool"),
        (model, data, {"batch_size": 0}, "--batch-size 0"),
        (model, data, {"group_by": "level"}, "no column level to group by"),
        (str(tmp_path), data, {}, r"has no config\.json"),
    ]
    for path, file, options, message in refused:
        with pytest.raises(UserError, match=message):
            run_evaluation(path, file, **options)
    with pytest.raises(UserError, match="t_max"):
        find_model(Source(model), {"t_min": 2.0})


def test_a_checkpoint_without_the_encoders_scalars_is_refused(tmp_path: Path) -> None:
    make_tiny("sudoku4", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    kept = {name: value for name, value in load_file(weights).items() if "language_model" not in name}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layer_scalar is missing"):
        opened(tmp_path / "model")
    weights.write_bytes(b"not weights")
    with pytest.raises(UserError, match="safetensors"):
        opened(tmp_path / "model")


@pytest.mark.parametrize(
    ("prompt", "said"), [("12<|image|>", r"--prompt holds <\|image\|>"), ("what?", "no token for a part of it")]
)
def test_a_prompt_that_would_lose_a_part_is_refused(prompt: str, said: str, model: str, tmp_path: Path) -> None:
    unreadable = Path(shutil.copytree(model, tmp_path / "unreadable"))
    (unreadable / "model.safetensors").write_bytes(b"not weights")  # told before they are read
    with pytest.raises(UserError, match=said):
        message_ids(find_model(Source(str(unreadable)), {}), [{"role": "user", "content": prompt}], "--prompt")


def test_a_model_that_has_diverged_is_told(model: str, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.decoder.norm.weight"].fill_(torch.nan)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="broken answers with NaN or infinity"):
        texts(opened(broken), [[2, 3, 9]])


def test_an_adapter_answers_as_the_merged_model_does(tmp_path: Path, model: str, capsys) -> None:
    experts = ("experts.gate_up_proj", "experts.down_proj")
    write_random_adapter(tmp_path / "adapter", Path(model), target_parameters=experts)
    merge_adapter(model, tmp_path / "adapter", tmp_path / "merged")
    prompts = [[2, 3, 9 + number] for number in range(16)]
    answers = [
        texts(opened(path, adapter), prompts)
        for path, adapter in ((model, tmp_path / "adapter"), (str(tmp_path / "merged"), None), (model, None))
    ]
    assert answers[0] == answers[1] != answers[2]
    base: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    theirs: Any = PeftModel.from_pretrained(base, tmp_path / "adapter")  # live on encoder and decoder, not merged
    ours = answer_prompts(opened(model, tmp_path / "adapter"), prompts[:8], 8, range(8))
    for number, said in enumerate(ours):
        torch.manual_seed(number)
        ids = torch.tensor([prompts[number]])
        assert (
            theirs.eval().generate(input_ids=ids, disable_compile=True).sequences[0, 3:].tolist() == said.answer.tokens
        )
    assert "was made for" not in capsys.readouterr().err

    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "another/model"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    warning = f"The adapter {tmp_path / 'adapter'} was made for another/model, here it is put on {model}.\n"
    merge_adapter(model, tmp_path / "adapter", tmp_path / "merged")
    assert warning in capsys.readouterr().err
    find_model(Source(model, adapter=tmp_path / "adapter"), {})
    assert warning in capsys.readouterr().err
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**settings, "target_parameters": None}))
    with pytest.raises(UserError, match="target_parameters does not name it: PEFT would not read them"):
        find_model(Source(model, adapter=tmp_path / "adapter"), {})


def test_an_adapter_that_cannot_be_used_is_refused_before_the_model_is_read(tmp_path: Path, model: str) -> None:
    unreadable = Path(shutil.copytree(model, tmp_path / "unreadable"))
    (unreadable / "model.safetensors").write_bytes(b"not weights")
    write_random_adapter(tmp_path / "adapter", Path(model))
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: torch.full_like(factor, torch.nan) for name, factor in load_file(weights).items()}, weights)
    for adapter, said in (("adapter", "holds NaN"), ("absent", "absent cannot be read")):
        with pytest.raises(UserError, match=said):
            find_model(Source(str(unreadable), adapter=tmp_path / adapter), {})


def test_a_file_of_prompts_is_answered_and_a_conversation_kept(tmp_path: Path, model: str, monkeypatch, capsys) -> None:
    rows = [{"prompt": PUZZLE, "id": 1}, {"messages": [{"role": "user", "content": SOLUTION}], "note": "n"}]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["--model", model, "--max-denoising-steps", "2"]
    assert cli.main(["generate", *asked, "--file", f"{tmp_path}/asked.jsonl", "--out", f"{tmp_path}/said.jsonl"]) == 0
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [{key: row[key] for key in own} for row, own in zip(said, rows, strict=True)] == rows
    cli.main(["generate", *asked, "--prompt", PUZZLE, "--watch"])
    assert capsys.readouterr().out.strip("\n") == said[0]["answer"].strip("\n")

    lines = iter([PUZZLE, "/watch", "12", "/reset", "/loud", "what?", PUZZLE, "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert cli.main(["chat", *asked]) == 0
    answered = capsys.readouterr()
    assert answered.out.startswith(said[0]["answer"])
    assert "/loud: no such command" in answered.err
    assert "no token for a part of it" in answered.err
    bad = {
        "absent": "{}",
        "answered": json.dumps({"messages": [*rows[1]["messages"], {"role": "assistant", "content": "a"}]}),
    }
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    bad["tools"] = json.dumps(rows[0] | {"tools": [tool]})
    bad["no-tools"] = json.dumps(rows[0] | {"tools": "?"})
    for name, line in bad.items():
        (tmp_path / f"{name}.jsonl").write_text(line + "\n")
        assert cli.main(["generate", *asked, "--file", f"{tmp_path}/{name}.jsonl"]) == 2
    assert "no prompt (a text) or messages" in (err := capsys.readouterr().err)
    assert "it ends with an answer already" in err
    assert "leaves out a part of tools[0]: 'weather'" in err  # this template knows none
    assert "tools" in err.splitlines()[-1]
    (tmp_path / "config.yaml").touch()
    for mistake, said in (
        (["--file", f"{tmp_path}/none.jsonl"], "--file: no file "),
        (["--prompt", PUZZLE, "--t-min", "-1"], "the sampler's settings, max_denoising_steps 2, t_min -1.0 set here: "),
        (["--prompt", PUZZLE, "--model", str(tmp_path)], f"--model {tmp_path}: this is a run's directory"),
    ):
        assert cli.main(["generate", *asked, *mistake]) == 2
        assert capsys.readouterr().err.startswith(said)
