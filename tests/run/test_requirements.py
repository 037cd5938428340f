"""What a rank is started with and into is looked at first, and told in one line."""

import os
import re
import socket

import pytest
import torch

from ds_dgemma.errors import UserError
from ds_dgemma.run import requirements
from ds_dgemma.run.requirements import check_environment
from tests.training import start_ranks

LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "1"}, "RANK set, but not LOCAL_RANK, WORLD_SIZE. Start with `deepspeed"),
        ({**LAUNCHED, "WORLD_SIZE": "two"}, "WORLD_SIZE=two: whole numbers were expected"),
        ({**LAUNCHED, "RANK": "2"}, "RANK=2 of WORLD_SIZE=2: ranks count from 0"),
    ],
)
def test_ranks_that_cannot_be_are_refused(variables, said, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(said)):
        check_environment()


@pytest.mark.parametrize(("library", "found"), [("torch", "2.1.0"), ("transformers", "5.22.0"), ("peft", None)])
def test_a_library_of_another_version_is_named(library, found, monkeypatch):
    version = requirements.metadata.version

    def other(name: str) -> str:
        if name != library:
            return version(name)
        if found is None:
            raise requirements.metadata.PackageNotFoundError
        return found

    monkeypatch.setattr(requirements.metadata, "version", other)
    with pytest.raises(UserError, match=rf"{library}: {found or 'no version'} is installed, \S+ is needed"):
        check_environment()


@pytest.mark.parametrize(
    ("gpus", "ranks", "said"), [(0, 1, "torch sees none of this machine's GPUs"), (2, 4, "4 ranks .* sees 2 GPUs")]
)
def test_gpus_that_are_missing_are_told_unless_the_cpu_is_meant(gpus, ranks, said, monkeypatch, tmp_path):
    (tmp_path / "version").write_text("a driver")
    monkeypatch.setattr(requirements, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_SIZE", str(ranks))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    check_environment()
    monkeypatch.delenv("DS_ACCELERATOR")
    with pytest.raises(UserError, match=said):
        check_environment()


@pytest.mark.slow
def test_a_port_in_use_is_told_and_ends_the_run(sudoku_run, tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr("tests.training.free_port", lambda: taken.getsockname()[1])
        (rank,) = start_ranks(sudoku_run, [f"run.dir={tmp_path}/run"], 1, tmp_path / "log")
        assert rank.wait(timeout=400) == 2
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    assert re.search(r"the ranks cannot meet \(MASTER_ADDR=127.0.0.1, MASTER_PORT=\d+\)", log), log
    assert os.listdir(tmp_path) == ["log"]
