"""Stop a run at the end of a step, with a checkpoint, when a signal asks any of its ranks or a launcher is gone.

SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (Slurm's warning before its time limit) only set a flag; the ranks compare their
flags at the end of every step and so stop at the same one. Before the first step there is nothing to keep, and the
rank ends at once. So does a second signal: Python would run a handler between two instructions of the main thread,
which may sit in a collective for half an hour, so a thread reads the byte of the C handler (`signal.set_wakeup_fd`).

One wish can come as two signals: Ctrl-C reaches the rank from the terminal and, as SIGTERM, from DeepSpeed's launcher,
a moment later: within `ONE_WISH_SECONDS`. The launcher goes from rank to rank and waits for each, up to 30 s, so it may
come later than that; but then only when the rank before has ended, which it does after all have agreed that the
checkpoint is whole, or was killed.

DeepSpeed's launcher can die and leave its ranks behind, which would go on beside the run that replaces them: SIGKILL
to `deepspeed` or to its per-node child. The kernel tells of a parent only, so a rank looks, every second, for both.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import takewhile

import psutil

from ds_dgemma.errors import EXIT_ORPHANED, EXIT_STOPPED
from ds_dgemma.ranks.layout import RankLayout, gather, sum_over_ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ONE_WISH_SECONDS = 3
PER_NODE = "deepspeed.launcher.launch"
LAUNCHERS = (PER_NODE, "deepspeed.launcher.runner", "bin/deepspeed")
# A launcher that is gone can tell nobody any more. Without a signal the ranks try for a checkpoint, for less time than
# the next start waits for them (LOCK_SECONDS in `checkpoint/run_directory.py`); a stop that a signal asked for has what
# it needs.
UNASKED_SECONDS, ASKED_SECONDS = 15, 600


class StopRequest:
    """This rank's wish to stop. Make it once, in the main thread.

    `step` is the step in hand, None before the first; `reason` is why to stop, None while there is no wish. `leave`
    ends this process at once, with an exit code and a word why.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self.reason: str | None = None
        self.leave: Callable[[int, str], None] = end_at_once
        self._asked = 0.0

    def listen(self) -> None:
        """Take the signals over. One that the parent process has ignored (`nohup`, `&` in a script) stays ignored."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: None)  # the thread has the byte
                signal.siginterrupt(number, False)  # libraries in C need not know of it
        os.register_at_fork(after_in_child=_forget)
        threading.Thread(target=self._read, args=(reader,), daemon=True, name="signals").start()

    def _read(self, reader: socket.socket) -> None:
        while True:
            for number in reader.recv(64):
                if number in SIGNALS:
                    self._receive(signal.Signals(number))

    def _receive(self, number: signal.Signals) -> None:
        if self.reason is None:
            self.wish(number.name)
            if self.step is None:
                self.leave(EXIT_STOPPED, f"stopped by {number.name} before the first step; the same command starts it")
            elif os.environ.get("RANK", "0") == "0":
                note = f"{number.name}: the run stops at the end of this step, with a checkpoint; again to end it now"
                print(note, file=sys.stderr, flush=True)
        elif time.monotonic() - self._asked > ONE_WISH_SECONDS:
            self.leave(128 + number, f"ended by a second signal ({number.name}), without a checkpoint")

    def watch_launcher(self) -> None:
        """End this rank when a DeepSpeed launcher that started it is gone."""
        launchers = list(takewhile(lambda process: _runs(process, LAUNCHERS), psutil.Process().parents()))
        if launchers:
            threading.Thread(target=self._watch, args=(launchers,), daemon=True, name="launcher-watch").start()

    def _watch(self, launchers: list[psutil.Process]) -> None:
        with suppress(psutil.NoSuchProcess):
            # `deepspeed` may be gone already: then its per-node child hangs below the system's first process, or the
            # user's.
            above = launchers[-1].parent()
            orphan = _runs(launchers[-1], (PER_NODE,)) and (not above or above.pid == 1 or above.name() == "systemd")
            while not orphan and all(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in launchers):
                time.sleep(1)
        if self.step is not None:
            asked = self.reason is not None
            self.wish("the loss of its launcher")
            time.sleep(ASKED_SECONDS if asked else UNASKED_SECONDS)
        self.leave(EXIT_ORPHANED, "ended: its launcher is gone")  # at once: a collective would wait for the others

    def wish(self, reason: str) -> None:
        """Ask for a stop at the end of this step; the first reason stays."""
        if self.reason is None:
            self.reason, self._asked = reason, time.monotonic()

    def agreed(self, ranks: RankLayout) -> bool:
        """Whether any rank wishes to stop; a collective."""
        return sum_over_ranks([float(self.reason is not None)], ranks.device)[0] > 0

    def reasons(self, ranks: RankLayout) -> str:
        """Why the run stops: each reason, and the ranks that have it; a collective."""
        wishes: dict[str, list[str]] = {}
        for rank, reason in enumerate(gather(self.reason, ranks)):
            wishes.setdefault(reason, []).append(str(rank))
        return ", ".join(f"{reason} (rank {', '.join(who)})" for reason, who in wishes.items() if reason)


def end_at_once(code: int, why: str) -> None:
    """End this process now, whatever its main thread does."""
    if os.environ.get("RANK", "0") == "0":
        if why:
            print(why, file=sys.stderr, flush=True)
        if sys.stdout.isatty():
            print("\x1b[?25h", end="", flush=True)  # the cursor, which a progress bar hid
    os._exit(code)


def _runs(process: psutil.Process, programs: tuple[str, ...]) -> bool:
    with suppress(psutil.Error):
        return any(program in " ".join(process.cmdline()) for program in programs)
    return False


def _forget() -> None:
    """A fork is not a rank: signals to it are its own."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
