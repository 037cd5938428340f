"""What the README tells people to type works: every command is one, and the way from data to a scored model is run."""

import argparse
import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from ds_dgemma import cli
from ds_dgemma.config.file import load_config
from ds_dgemma.data.sudoku import write_sudoku
from ds_dgemma.ranks.layout import free_port
from ds_dgemma.tools.tiny import make_tiny
from tests.forks import start
from tests.training import train

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["train.max_steps=2", "optimizer.warmup_steps=1"]
DOCUMENTS = ["README.md", "launch/README.md", "ds_configs/README.md"]


def commands(document: str, program: str) -> list[list[str]]:
    """The indented lines that start with a program, as words, without their comments."""
    lines = (line.strip() for line in (ROOT / document).read_text().splitlines() if line.startswith("    "))
    return [shlex.split(line, comments=True) for line in lines if line.startswith(f"{program} ")]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_one(document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for _, *words in commands(document, "ds-dgemma"):
        cli.parser().parse_args(words)  # exits where an option or a command is unknown
    options = argparse.ArgumentParser()
    options.add_argument("--config", type=Path)
    options.add_argument("--set", action="append", default=[])
    for words in commands(document, "deepspeed"):
        assert words[words.index("--module") + 1] == "ds_dgemma.train"
        known, _ = options.parse_known_args(words)
        if known.config.is_relative_to("ds_configs"):
            load_config(known.config, known.set)


@pytest.mark.slow
def test_the_way_from_data_to_an_evaluated_model(tmp_path: Path) -> None:
    """The README's commands as they stand, on little data and for two steps."""
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    (tmp_path / "runs").mkdir()
    rows = [{"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}."} for n in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    puzzles = tmp_path / "runs/sudoku-data"
    make_tiny("sudoku4", puzzles / "model")
    write_sudoku(4, "train", 64, 0, puzzles / "train.jsonl")
    write_sudoku(4, "test", 5, 0, puzzles / "test.jsonl")

    def run(*words: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
        with (tmp_path / "said").open("wb") as output:
            if words[0] == "ds-dgemma":  # its entry point, without the seconds of its imports
                code = start(["ds_dgemma", *words[1:]], environment, output, tmp_path).wait(900)
            else:
                streams = {"stdout": output, "stderr": output}
                code = subprocess.run(words, cwd=tmp_path, env=environment, timeout=900, **streams).returncode
        assert code == 0, f"{shlex.join(words)}\n{(tmp_path / 'said').read_text()[-4000:]}"

    def short(words: list[str], *more: str) -> list[str]:
        settings = [*SHORT, *more]
        port = ["--master_port", str(free_port())]
        return [words[0], *port, *words[1:], *(word for setting in settings for word in ("--set", setting))]

    inspected, made, *used = commands("README.md", "ds-dgemma")[:6]
    run(*made)
    model = f"model.path={tmp_path}/runs/gsm8k-data/model"
    run(*inspected, "--set", model, "--json", "seen.jsonl")
    assert len((tmp_path / "seen.jsonl").read_text().splitlines()) == 20
    for example in ("tool_calling", "thinking"):
        data = f"data.train={ROOT}/ds_configs/examples/{example}.jsonl"
        one = ["train.global_batch_size=1", "train.micro_batch_size=1"]
        settings = [model, data, "train.precision=fp32", *one, *SHORT]
        steps = train(ROOT / f"ds_configs/runs/{example}.yaml", tmp_path / f"runs/{example}", settings, processes=1)
        assert len(steps) == 2
    (trained,) = commands("README.md", "deepspeed")
    run(*short(trained, "data.train=train.jsonl"))
    # As launch/demo.sh does it, but without the launcher.
    here = [f"model.path={puzzles}/model", f"data.train={puzzles}/train.jsonl", *SHORT]
    train(ROOT / "ds_configs/runs/sudoku.yaml", tmp_path / "runs/sudoku", here, processes=2)
    for words in used:
        run(*words)
    assert (tmp_path / "runs/sudoku/plots/curves.png").is_file()
