"""Ranks that only add numbers, until rank 0 or 1 meets with a misfortune at step 5: `sinking EVENT RANK MINUTES`."""

import os
import signal
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from ds_dgemma.ranks.layout import RankLayout, disconnect, sum_over_ranks
from ds_dgemma.ranks.stop_request import StopRequest
from ds_dgemma.watch.liveness import Liveness


def fail() -> None:
    raise ValueError("a value like no other\nand a second line")


EVENTS = {
    "fail": fail,
    "hang": lambda: time.sleep(1000),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}


def main(event: str, rank: int, minutes: float) -> int:
    """Add numbers until a signal comes; 75 then, as training has it."""
    ranks = RankLayout.from_environment(1)
    stop = StopRequest()
    stop.listen()
    dist.init_process_group("gloo", timeout=timedelta(minutes=minutes))
    with Liveness(ranks, minutes, stop):
        step = 0
        while not stop.agreed(ranks):
            step += 1
            stop.step = step
            if step == 5 and ranks.rank == rank:
                EVENTS[event]()
            sum_over_ranks([1.0], ranks.device)
            time.sleep(0.01)
        disconnect()
    return 75


if __name__ == "__main__":
    try:
        code = main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 0
    sys.stdout.flush()
    os._exit(code)
