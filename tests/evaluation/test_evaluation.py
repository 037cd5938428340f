"""Scores are right, easy puzzles cannot hide hard ones, and answers belong to their prompts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_dgemma.checkpoint.export import merge_adapter
from ds_dgemma.data.sudoku import write_sudoku
from ds_dgemma.errors import UserError
from ds_dgemma.evaluation.generation import Source, answer_prompts, answer_text, evaluate, load_generator
from ds_dgemma.evaluation.scorers import score_sudoku, summarise
from ds_dgemma.tools.tiny import make_tiny
from tests.reference.adapters import write_random_adapter

SOLUTION = "1234341221434321"
PUZZLE = "12..34..2...43.."  # 7 clues, 9 blanks


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
    score = score_sudoku([{"role": "user", "content": PUZZLE}], SOLUTION, answer)
    assert score.right == {"solved": (solved, 1), "cells": (cells, 16), "blank_cells": (blank_cells, 9)}
    assert score.group == {"blanks": 9, "clues": 7}


def test_another_valid_grid_that_keeps_the_clues_is_solved_and_letters_do_as_well() -> None:
    puzzle = [{"role": "user", "content": "." * 16}]
    letters = str.maketrans("1234", "ACFI")
    assert score_sudoku(puzzle, SOLUTION, "2143432112343412").right["solved"] == (1, 1)
    assert score_sudoku(puzzle, SOLUTION.translate(letters), "2143432112343412").right["solved"] == (0, 1)
    assert score_sudoku(puzzle, SOLUTION.translate(letters), SOLUTION.translate(letters)).right["solved"] == (1, 1)


def test_shares_are_of_all_examples_and_of_each_number_of_blanks() -> None:
    easy, hard = "123434122143432.", "12.............."
    answers = [(easy, SOLUTION), (easy, SOLUTION), (easy, SOLUTION), (hard, SOLUTION), (hard, "")]
    report = summarise(score_sudoku([{"role": "user", "content": p}], SOLUTION, answer) for p, answer in answers)
    assert (report["examples"], report["solved"], report["cells"]) == (5, 0.8, 0.8)
    assert report["blank_cells"] == 17 / 31
    assert report["groups"] == [
        {"blanks": 1, "clues": 15, "examples": 3, "solved": 1.0, "cells": 1.0, "blank_cells": 1.0},
        {"blanks": 14, "clues": 2, "examples": 2, "solved": 0.5, "cells": 0.5, "blank_cells": 0.5},
    ]


def test_answers_come_in_the_order_of_their_prompts_and_end_at_the_stop(model: str) -> None:
    generator = load_generator(Source(model))
    short, long, other_long = [2, 3, 9], [2, 3, 10, 11, 12], [2, 3, 12, 11, 10]
    a, b, c = answer_prompts(generator, [long, short, other_long], batch_size=8, seed=0)
    assert answer_prompts(generator, [short, long, other_long], batch_size=8, seed=0) == [b, a, c]
    assert len({a, b, c}) == 3
    answers = answer_prompts(generator, [short] * 32, batch_size=32, seed=0)
    assert not any(stop in answer for answer in answers for stop in ("<eos>", "<turn|>"))
    assert len({len(answer) for answer in answers}) > 1  # cut where they ended, not at the canvas


def test_a_report_is_repeatable_and_counts_every_puzzle_once(tmp_path: Path, model: str) -> None:
    write_sudoku(4, "test", 12, 0, tmp_path / "test.jsonl")
    reports = [evaluate(Source(model), str(tmp_path / "test.jsonl"), "sudoku", 5, 10, seed=3) for _ in range(2)]
    assert reports[0] == reports[1]
    assert reports[0]["examples"] == sum(group["examples"] for group in reports[0]["groups"]) == 10
    first, again, other = (answer_text(Source(model), PUZZLE, seed) for seed in (0, 0, 1))
    assert first == again != other


def test_what_cannot_be_evaluated_is_refused_by_name(tmp_path: Path, model: str) -> None:
    write_sudoku(4, "test", 3, 0, tmp_path / "test.jsonl")
    data = str(tmp_path / "test.jsonl")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (tmp_path / "chat.jsonl").write_text(Path(data).read_text() + json.dumps({"messages": chat}) + "\n")
    refused = [
        (model, str(tmp_path / "chat.jsonl"), "sudoku", 8, r"chat\.jsonl:4: not a Sudoku record"),
        (model, str(tmp_path / "absent.jsonl"), "sudoku", 8, r"absent\.jsonl"),
        (model, data, "sudokus", 8, "Did you mean sudoku"),
        (model, data, "sudoku", 0, "--batch-size 0"),
        (str(tmp_path), data, "sudoku", 8, r"has no config\.json"),
    ]
    for path, file, scorer, batch_size, message in refused:
        with pytest.raises(UserError, match=message):
            evaluate(Source(path), file, scorer, batch_size, None, seed=0)


def test_a_checkpoint_without_the_encoders_scalars_is_refused(tmp_path: Path) -> None:
    make_tiny("sudoku4", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    kept = {name: value for name, value in load_file(weights).items() if "language_model" not in name}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 4 weights.*layer_scalar"):
        load_generator(Source(str(tmp_path / "model")))
    weights.write_bytes(b"not weights")
    with pytest.raises(UserError, match="could not be loaded"):
        load_generator(Source(str(tmp_path / "model")))


@pytest.mark.parametrize(
    ("prompt", "said"), [("12<|image|>", r"--prompt holds <\|image\|>"), ("what?", "no token for a part of it")]
)
def test_a_prompt_that_would_lose_a_part_is_refused(prompt: str, said: str, model: str, tmp_path: Path) -> None:
    unreadable = Path(shutil.copytree(model, tmp_path / "unreadable"))
    (unreadable / "model.safetensors").write_bytes(b"not weights")  # told before they are read
    with pytest.raises(UserError, match=said):
        answer_text(Source(str(unreadable)), prompt, seed=0)


def test_a_model_that_has_diverged_is_told(model: str, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.decoder.norm.weight"].fill_(torch.nan)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="broken answers with NaN or infinity"):
        answer_text(Source(str(broken)), PUZZLE, seed=0)


def test_peft_adds_an_adapter_and_answers_as_the_merged_model_does(tmp_path: Path, model: str, capsys) -> None:
    experts = ("experts.gate_up_proj", "experts.down_proj")
    write_random_adapter(tmp_path / "adapter", Path(model), target_parameters=experts)
    merge_adapter(model, tmp_path / "adapter", tmp_path / "merged")
    prompts = [[2, 3, 9 + number] for number in range(16)]
    answers = [
        answer_prompts(load_generator(Source(path, adapter=adapter)), prompts, batch_size=16, seed=0)
        for path, adapter in ((model, tmp_path / "adapter"), (str(tmp_path / "merged"), None), (model, None))
    ]
    assert answers[0] == answers[1] != answers[2]
    assert "was made for" not in capsys.readouterr().err

    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "another/model"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    warning = f"The adapter {tmp_path / 'adapter'} was made for another/model, here it is put on {model}.\n"
    merge_adapter(model, tmp_path / "adapter", tmp_path / "merged")
    assert warning in capsys.readouterr().err
    load_generator(Source(model, adapter=tmp_path / "adapter"))
    assert warning in capsys.readouterr().err
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**settings, "target_parameters": None}))
    with pytest.raises(UserError, match="target_parameters does not name it: PEFT would not read them"):
        load_generator(Source(model, adapter=tmp_path / "adapter"))


def test_an_adapter_that_cannot_be_used_is_refused_before_the_model_is_read(tmp_path: Path, model: str) -> None:
    unreadable = Path(shutil.copytree(model, tmp_path / "unreadable"))
    (unreadable / "model.safetensors").write_bytes(b"not weights")
    write_random_adapter(tmp_path / "adapter", Path(model))
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: torch.full_like(factor, torch.nan) for name, factor in load_file(weights).items()}, weights)
    for adapter, said in (("adapter", "holds NaN"), ("absent", "absent cannot be read")):
        with pytest.raises(UserError, match=said):
            load_generator(Source(str(unreadable), adapter=tmp_path / adapter))
