"""A rank that dies or hangs ends the others in bounded time, and one message names it."""

import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from ds_dgemma.errors import EXIT_LOST_RANK
from ds_dgemma.ranks.layout import RankLayout
from ds_dgemma.ranks.stop_request import ONE_WISH_SECONDS, StopRequest
from ds_dgemma.watch.liveness import Liveness
from tests.training import start_module

MISFORTUNES = {
    ("fail", 1): (1, r"rank 1 on \S+ \(pid \d+\) failed in step 5: ValueError: a value like no other$"),
    ("kill", 1): (-signal.SIGKILL, r"rank 1 on \S+ \(pid \d+\) is gone: .*killed"),
    ("kill", 0): (-signal.SIGKILL, r"rank 0 on \S+ \(pid \d+\) is gone: .*killed"),
    ("freeze", 1): (None, r"rank 1 on \S+ \(pid \d+\) does not answer: nothing heard for \d+ s"),
    ("hang", 1): (EXIT_LOST_RANK, r"rank 1 on \S+ \(pid \d+\) hangs in step 5 at engine/sinking.py:\d+"),
}


def start(event: str, rank: int, log: Path, minutes: float = 0.1) -> list[subprocess.Popen]:
    return start_module(["tests.engine.sinking", event, str(rank), str(minutes)], 2, log)


@pytest.mark.slow
@pytest.mark.parametrize(("event", "rank"), MISFORTUNES)
def test_a_lost_rank_is_named_once_and_the_others_end(event: str, rank: int, tmp_path: Path) -> None:
    code, line = MISFORTUNES[event, rank]
    log = tmp_path / "log"
    ranks = start(event, rank, log)
    try:
        assert ranks[1 - rank].wait(180) == EXIT_LOST_RANK, log.read_text()
        if code is not None:  # a frozen process cannot end itself
            assert ranks[rank].wait(60) == code
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    text = log.read_text()
    assert len(re.findall(line, text, re.MULTILINE)) == 1, text
    assert text.count("Traceback") == (event == "fail"), text


@pytest.mark.slow
def test_a_second_signal_ends_a_rank_at_once_inside_a_collective(tmp_path: Path) -> None:
    log = tmp_path / "log"
    ranks = start("freeze", 0, log, minutes=5)  # rank 1 waits for it for five minutes
    try:
        frozen = psutil.Process(ranks[0].pid)
        wait_until(lambda: frozen.status() == psutil.STATUS_STOPPED)
        time.sleep(1)  # for rank 1 to come to the collective
        ranks[1].terminate()
        ranks[1].terminate()  # the same wish
        time.sleep(ONE_WISH_SECONDS + 1)
        assert ranks[1].poll() is None, log.read_text()
        ranks[1].terminate()
        assert ranks[1].wait(20) == 128 + signal.SIGTERM
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_running_out_of_memory_is_told_with_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    stop = StopRequest()
    stop.step = 7
    with pytest.raises(SystemExit) as ending, Liveness(RankLayout(0, 1, 0, 1, 1), 1, stop):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    told = capsys.readouterr().err
    assert ending.value.code == 1
    assert told.startswith("failed in step 7: OutOfMemoryError: CUDA out of memory")
    assert "train.micro_batch_size" in told
    assert "Traceback" not in told
