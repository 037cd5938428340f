"""A user's mistake: one clear message, exit code 2 on every rank, no trace, nothing left hanging, nothing
overwritten.
"""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from ds_dgemma.checkpoint.pretrained import open_pretrained
from ds_dgemma.checkpoint.run_directory import claim, find_start
from ds_dgemma.config.file import load_config
from ds_dgemma.config.recorded import check_belongs
from ds_dgemma.config.run import RunConfig
from ds_dgemma.engine.ds_config import deepspeed_config
from ds_dgemma.errors import EXIT_STOPPED, UserError
from ds_dgemma.ranks.layout import RankLayout
from ds_dgemma.run.prepare import Prepared, prepare
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


def prepared(config: RunConfig) -> Prepared:
    """What the first of two ranks prepares in a directory of its own."""
    ranks = RankLayout(0, 2, 0, 2, config.parallel.expert_parallel_size)
    settings = deepspeed_config(config, ranks.world, "cpu")
    check_belongs(config)
    found = find_start(config)
    return prepare(config, settings, ranks, open_pretrained(config.model.path, config.model.revision), found)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_any_weight_is_read(mistake, copied_run):
    break_it, named = MISTAKES[mistake]
    overrides = break_it(copied_run.parent)
    before = files_of(copied_run.parent)

    def open_run() -> None:
        config = load_config(copied_run, overrides)
        with claim(config.run.dir):
            prepared(config)

    with pytest.raises(UserError) as raised:
        open_run()
    for words in named:
        assert words in str(raised.value)
    after = files_of(copied_run.parent)
    assert {path: after.get(path) for path in before} == before, "something was overwritten"


def test_what_may_be_meant_is_a_warning(copied_run: Path) -> None:
    config = load_config(copied_run, ["data.max_length=4097"])
    told = prepared(config).warnings
    assert len(told) == 2
    assert all(any(words in line for line in told) for words in ("data.max_length 4,097", "optimizer.warmup_steps"))


@pytest.mark.slow
def test_under_the_launcher_a_mistake_is_told_once_and_is_its_exit_code(copied_run, tmp_path):
    break_it, named = MISTAKES["unknown key"]  # each rank finds it
    job = Job(copied_run, copied_run.parent / "run", break_it(copied_run.parent), 2, tmp_path / "log")
    code = job.end(400)
    told_once(named, "\n".join(line for line in job.output().splitlines() if not LAUNCHER_SAYS.match(line)))
    assert code == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "mistake", ["experts that do not divide", "broken line", "template that refuses", "truncated weights"]
)
def test_a_mistake_is_told_once_and_ends_every_rank(mistake, copied_run, tmp_path):
    break_it, named = MISTAKES[mistake]
    ranks = start_ranks(copied_run, break_it(copied_run.parent), 2, tmp_path / "log")
    codes = [rank.wait(400) for rank in ranks]
    told_once(named, (tmp_path / "log").read_text())
    assert codes == [2, 2]


@pytest.mark.slow
def test_a_rank_that_has_nothing_to_tell_waits_for_the_one_that_has(copied_run, tmp_path):
    """Its end would make a launcher end the other, on a busy machine before that has told."""
    teller, silent = start_ranks(copied_run, ["optimizer.lear=1"], 2, tmp_path / "log")
    assert teller.wait(400) == 2
    time.sleep(1)
    assert silent.poll() is None
    silent.terminate()
    assert silent.wait(40) in (-signal.SIGTERM, EXIT_STOPPED)
    told_once(["optimizer.lear"], (tmp_path / "log").read_text())


def told_once(named: list[str], said: str) -> None:
    assert "Traceback" not in said
    assert said.count(named[0]) == 1, said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory_is_refused(copied_run, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    (rank,) = start_ranks(copied_run, [f"run.dir={locked}/run"], 1, tmp_path / "log")
    assert rank.wait(timeout=400) == 2
    assert "cannot be used" in (tmp_path / "log").read_text()
