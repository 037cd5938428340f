"""The command line: instant help, one message and exit code 2 for a mistake, never a trace."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ds_dgemma import cli

COMMANDS = (
    "make-tiny",
    "make-sudoku",
    "make-shapes",
    "export",
    "evaluate",
    "generate",
    "chat",
    "plot",
    "replay",
    "config-reference",
)


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False)


def test_help_names_every_command_without_importing_torch() -> None:
    done = run("-X", "importtime", "-m", "ds_dgemma", "--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)
    assert not any(name in done.stderr for name in ("torch", "transformers", "numpy", "rich"))


def test_a_puzzle_file_is_made_and_evaluated_from_the_shell_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, model, report = tmp_path / "test.jsonl", tmp_path / "model", tmp_path / "new" / "report.json"
    sudoku = ["make-sudoku", "--size", "4", "--split", "test", "--count", "5", "--seed", "1", "--out", str(data)]
    assert cli.main(sudoku) == 0
    assert cli.main(["make-tiny", "--preset", "sudoku4", "--out", str(model)]) == 0
    scored = ["evaluate", "--model", str(model), "--data", str(data), "--task", "sudoku", "--limit", "2"]
    capsys.readouterr()
    assert cli.main([*scored, "--out", str(report)]) == 0
    printed = capsys.readouterr().out
    assert json.loads(report.read_text())["examples"] == 2
    assert all(column in printed for column in ("blanks", "clues", "solved", "cells"))


@pytest.mark.parametrize(
    "args",
    [
        ["make-sudoku", "--split", "test", "--count", "0", "--out", "x.jsonl"],
        ["make-sudoku", "--split", "test", "--count", "3", "--out", "/dev/null/x.jsonl"],
        ["make-shapes", "--split", "test", "--count", "3", "--out", "/dev/null/x.jsonl"],
        ["make-tiny", "--preset", "text", "--out", "model"],
        ["evaluate", "--model", "absent/model", "--data", "absent.jsonl", "--task", "sudoku"],
        ["generate", "--model", "./absent", "--prompt", "hello"],
        ["export", "--run", "absent", "--out", "export"],
        ["plot", "absent"],
    ],
    ids=lambda args: " ".join(args[:3]),
)
def test_a_mistake_is_one_message_and_exit_code_2(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(args) == 2
    printed = capsys.readouterr()
    assert printed.err.strip()
    assert "Traceback" not in printed.err
    assert "model.path" not in printed.err  # nobody typed that
    assert not printed.out
    assert not list(tmp_path.iterdir())


def test_the_process_itself_ends_with_2_and_no_trace(tmp_path: Path) -> None:
    for args in (["make-sudoku", "--split", "test", "--count", "0", "--out", str(tmp_path / "x")], ["no-such-command"]):
        done = run("-m", "ds_dgemma", *args)
        assert done.returncode == 2
        assert done.stderr
        assert "Traceback" not in done.stderr


def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "ds_dgemma", "config-reference"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_interrupting_a_command_exits_with_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ds_dgemma.data.sudoku.make_puzzles", interrupt)
    out = tmp_path / "x.jsonl"
    assert cli.main(["make-sudoku", "--split", "test", "--count", "1", "--out", str(out)]) == 130
    assert not list(tmp_path.iterdir())
