"""Stop a run at the end of a step, with a checkpoint, when a signal asks any of its ranks.

SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (Slurm's warning before its time limit) only set a flag; the ranks compare their
flags at the end of every step and so stop at the same one. Before the first step there is nothing to keep, and the
rank ends at once.

A second signal ends the rank at once. Python runs its handlers between two instructions of the main thread, which may
sit in a collective for half an hour; so the C handler's byte (`signal.set_wakeup_fd`) is read by a thread. (Signals
that are blocked and waited for with `sigwaitinfo` would do too, and tell the sender, but every thread would have to
block them, those that importing numpy and torch starts among them, and every program that a rank starts would inherit
that and not end by them.)

One wish can come as two signals: Ctrl-C reaches the rank from the terminal and, as SIGTERM, from DeepSpeed's launcher,
which passes it on a moment later. So what comes within `ONE_WISH_SECONDS` of the first is the same wish. The launcher
goes from rank to rank and waits for each, up to 30 s, so its SIGTERM may come later than that; but then only when the
rank before has ended, which it does after all have agreed that the checkpoint is whole, or was killed.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

from ds_dgemma.errors import EXIT_STOPPED
from ds_dgemma.ranks.layout import RankLayout, gather, sum_over_ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ONE_WISH_SECONDS = 3
# A launcher that is gone can tell nobody any more. Without a signal the ranks try for a checkpoint, for less time than
# the next start waits for them (LOCK_SECONDS in `run/directory.py`); a stop that a signal asked for has what it needs.
UNASKED_SECONDS = 15
ASKED_SECONDS = 600


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
        self._reader, self._writer = socket.socketpair()

    def listen(self) -> None:
        """Take the signals over. One that the parent process has ignored (`nohup`, `&` in a script) stays ignored."""
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _nothing)
                signal.siginterrupt(number, False)  # libraries in C need not know of it
        os.register_at_fork(after_in_child=_forget)
        threading.Thread(target=self._read, daemon=True, name="signals").start()

    def _read(self) -> None:
        while True:
            for number in self._reader.recv(64):
                if number in SIGNALS:
                    self._receive(signal.Signals(number))

    def _receive(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.reason is None:
            self.reason, self._asked = number.name, now
            if self.step is None:
                self.leave(EXIT_STOPPED, f"stopped by {number.name} before the first step; the same command starts it")
            elif os.environ.get("RANK", "0") == "0":
                note = f"{number.name}: the run stops at the end of this step, with a checkpoint; again to end it now"
                print(note, file=sys.stderr, flush=True)
        elif now - self._asked > ONE_WISH_SECONDS:
            self.leave(128 + number, f"ended by a second signal ({number.name}), without a checkpoint")

    def wish(self, reason: str) -> None:
        """Ask for a stop at the end of this step, for a reason that is no signal."""
        self.reason = self.reason or reason

    def agreed(self, ranks: RankLayout) -> bool:
        """Whether any rank wishes to stop; a collective."""
        return sum_over_ranks([float(self.reason is not None)], ranks.device)[0] > 0

    def reasons(self, ranks: RankLayout) -> str:
        """Why the run stops: each reason, and the ranks that have it; a collective."""
        wishes: dict[str, list[int]] = {}
        for rank, reason in enumerate(gather(self.reason, ranks)):
            if reason is not None:
                wishes.setdefault(reason, []).append(rank)
        return ", ".join(f"{reason} (rank {', '.join(map(str, who))})" for reason, who in wishes.items())

    def launcher_is_gone(self) -> float:
        """Take the loss of the launcher for a wish to stop; return the seconds that this rank may still have."""
        if self.step is None:
            return 0
        if self.reason is not None:
            return ASKED_SECONDS
        self.reason, self._asked = "the loss of its launcher", time.monotonic()
        return UNASKED_SECONDS


def end_at_once(code: int, why: str) -> None:
    """End this process now, whatever its main thread does."""
    if os.environ.get("RANK", "0") == "0":
        if why:
            print(why, file=sys.stderr, flush=True)
        if sys.stdout.isatty():
            print("\x1b[?25h", end="", flush=True)  # the cursor, which a progress bar hid
    os._exit(code)


def _nothing(*_: object) -> None:
    """Handlers of Python's are not needed: the thread has the byte."""


def _forget() -> None:
    """A fork is not a rank: signals to it are its own."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if signal.getsignal(number) is _nothing:
            signal.signal(number, signal.SIG_DFL)
