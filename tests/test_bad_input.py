"""A user's mistake: one clear message, exit code 2 on every rank, no trace, nothing left hanging, nothing
overwritten.
"""

import os
import re
import shutil
from pathlib import Path

import pytest

from ds_dgemma.config_file import load_config
from ds_dgemma.engine.ranks import RankLayout
from ds_dgemma.errors import UserError
from ds_dgemma.run_directory import claim, find_start
from ds_dgemma.training.prepare import prepare
from tests.bad_inputs import MISTAKES
from tests.broken_job import Job
from tests.training import start_ranks

LAUNCHER_SAYS = re.compile(r"\[20\d\d-|Setting ds_accelerator")


@pytest.fixture
def copied_run(sudoku_run: Path, tmp_path: Path) -> Path:
    """The shared run's files, for a test to break."""
    folder = tmp_path / "copy"
    shutil.copytree(sudoku_run.parent, folder, ignore=shutil.ignore_patterns("run"))
    settings = (folder / "run.yaml").read_text().replace(str(sudoku_run.parent), str(folder))
    (folder / "run.yaml").write_text(settings.replace("micro_batch_size: 8", "micro_batch_size: 4"))
    return folder / "run.yaml"


def files_of(folder: Path) -> dict[str, float]:
    """Every file with its time of change."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_any_weight_is_read(mistake, copied_run):
    break_it, named = MISTAKES[mistake]
    overrides = break_it(copied_run.parent)
    before = files_of(copied_run.parent)

    def open_run() -> None:
        config = load_config(copied_run, overrides)
        with claim(config.run.dir):
            start = find_start(config)
            prepare(config, RankLayout(0, 2, 0, 2, config.parallel.expert_parallel_size), start)

    with pytest.raises(UserError) as raised:
        open_run()
    for words in named:
        assert words in str(raised.value)
    after = files_of(copied_run.parent)
    assert {path: after.get(path) for path in before} == before, "something was overwritten"


@pytest.mark.slow
@pytest.mark.parametrize(
    "mistake",
    [
        "experts that do not divide",
        "broken line",
        "template that refuses",
        "truncated weights",
        "another run's directory",
    ],
)
def test_a_mistake_is_told_once_and_ends_every_rank(mistake, copied_run, tmp_path):
    break_it, named = MISTAKES[mistake]
    overrides = [f"run.dir={copied_run.parent}/run", *break_it(copied_run.parent)]
    ranks = start_ranks(copied_run, overrides, 2, tmp_path / "log")
    assert_told_once([rank.wait(timeout=300) for rank in ranks], (tmp_path / "log").read_text(), named[0])


@pytest.mark.slow
def test_a_mistake_is_told_once_through_the_launcher_too(copied_run, tmp_path):
    break_it, named = MISTAKES["unknown key"]
    job = Job(copied_run, copied_run.parent / "run", break_it(copied_run.parent), 2, tmp_path / "log")
    code = job.end(600)
    lines = [line for line in job.output().splitlines() if not LAUNCHER_SAYS.match(line)]
    assert_told_once([code], "\n".join(lines), named[0])


def assert_told_once(codes: list[int | None], said: str, named: str) -> None:
    assert set(codes) == {2}, said
    assert "Traceback" not in said
    assert said.count(named) == 1, said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory_is_refused(copied_run, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    (rank,) = start_ranks(copied_run, [f"run.dir={locked}/run"], 1, tmp_path / "log")
    assert rank.wait(timeout=300) == 2
    assert "cannot be used" in (tmp_path / "log").read_text()
