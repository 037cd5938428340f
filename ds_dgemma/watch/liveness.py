"""Ranks that look after each other: one that dies or hangs ends all of them in bounded time, with one message.

Without this a collective tells of a dead rank by "Connection closed by peer" on every other rank, or not before its
time-out. Here rank 0 says which rank it was, on which host, in which step and why (`rank_watch.py`), and every other
rank ends without a trace of what is only the consequence.
"""

import os
import re
import secrets
import socket
import sys
import threading
import time
from types import TracebackType
from typing import Protocol

import torch
import torch.distributed as dist

from ds_dgemma.errors import EXIT_LOST_RANK, EXIT_USER_ERROR, UserError, first_line
from ds_dgemma.ranks.layout import RankLayout, gather
from ds_dgemma.ranks.stop_request import StopRequest, end_at_once
from ds_dgemma.watch.lifeline import Lifeline, call, listen
from ds_dgemma.watch.rank_watch import BEAT_SECONDS, Member, RankWatch, readable, when, whereabouts

CONNECT_SECONDS = 60
WORD_SECONDS = 20  # for rank 0's word after a failed collective
GRACE_SECONDS = 1  # for this rank to end by itself after rank 0's word
CONSEQUENCE = re.compile(r"gloo|NCCL|TCPStore|Connection (closed|reset) by peer|Broken pipe|Socket Timeout")


class Watch(Protocol):
    """This rank's side of looking after each other; each of the four returns the exit code."""

    def mistake(self, text: str) -> int: ...
    def failed(self, words: str) -> int: ...
    def suffered(self, words: str) -> int: ...
    def say(self, code: int, why: str) -> None: ...
    def close(self) -> None: ...


class Liveness:
    """Look after each other while a block runs, and end this rank with an exit code when an exception leaves it.

    A user's mistake is printed without a trace, an exception of this rank's own with one. Raises SystemExit.
    """

    def __init__(self, ranks: RankLayout, timeout_minutes: float, stop: StopRequest) -> None:
        self._watch = _start(ranks, timeout_minutes * 60, stop)
        stop.leave = self._watch.say

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None or isinstance(error, SystemExit):
            self._watch.close()
            return
        raise SystemExit(self._end(error))

    def _end(self, error: BaseException) -> int:
        if isinstance(error, UserError):
            return self._watch.mistake(str(error))
        words = f"{type(error).__name__}: {first_line(error)}"
        if is_out_of_memory(error):
            return self._watch.failed(
                f"{words}. Lower train.micro_batch_size, set train.activation_checkpointing: full, raise "
                "parallel.expert_parallel_size, or offload (ds_configs/README.md); `ds-dgemma plan` tells what fits."
            )
        if is_consequence(error):
            return self._watch.suffered(words)
        sys.excepthook(type(error), error, error.__traceback__)
        return self._watch.failed(words)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's, or this process's, memory did not suffice."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError)


def is_consequence(error: BaseException) -> bool:
    """Whether a collective failed under this rank: because of another one, as long as nothing else is known."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError | ConnectionError) and CONSEQUENCE.search(str(error)) is not None
    )


def _start(ranks: RankLayout, timeout: float, stop: StopRequest) -> Watch:
    if ranks.world == 1:
        return _Alone(stop)
    server = listen() if ranks.is_main else None
    port, token = (server.getsockname()[1], secrets.token_hex()) if server else (0, "")
    everyone = gather((socket.gethostname(), os.getpid(), port, token), ranks)
    members = [Member(rank, host, pid) for rank, (host, pid, _, _) in enumerate(everyone)]
    _, _, port, token = everyone[0]
    if server:
        return RankWatch(members, server, token, timeout, stop)
    try:
        line = call(port, CONNECT_SECONDS)
    except OSError as error:
        where = f"{os.environ['MASTER_ADDR']}:{port}"
        print(f"warning: {members[ranks.rank]} cannot reach rank 0 at {where} ({first_line(error)}): "
              "it will not be named when it is lost", file=sys.stderr, flush=True)  # fmt: skip
        return _Alone(stop)
    line.send(rank=ranks.rank, token=token)
    return _Follower(members, ranks.rank, line, timeout, stop)


class _Alone:
    """The only rank: nobody else to look after."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def mistake(self, text: str) -> int:
        print(text, file=sys.stderr, flush=True)
        return EXIT_USER_ERROR

    def failed(self, words: str) -> int:
        print(f"failed {when(self._stop.step)}: {words}", file=sys.stderr, flush=True)
        return 1

    suffered = failed

    def say(self, code: int, why: str) -> None:
        end_at_once(code, why)

    def close(self) -> None:
        pass


class _Follower:
    """Any rank but 0: tells rank 0 that it lives, and ends at its word or at its death."""

    def __init__(self, members: list[Member], rank: int, line: Lifeline, timeout: float, stop: StopRequest) -> None:
        self._leader, self._line, self._timeout, self._stop = members[0], line, timeout, stop
        self._speaks = rank == 1  # for rank 0, when that is gone
        self._closed, self._answered = threading.Event(), threading.Event()
        self._word: int | None = None
        self._frozen = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="liveness")
        self._thread.start()

    def mistake(self, text: str) -> int:
        return self._last(EXIT_USER_ERROR, mistake=text)

    def failed(self, words: str) -> int:
        return self._last(1, failed=words)

    def suffered(self, words: str) -> int:
        self._last(EXIT_LOST_RANK, suffers=words)
        return self._word or EXIT_LOST_RANK

    def say(self, code: int, why: str) -> None:
        """A last word of this process, which ends now; sent, where that takes no time."""
        self._line.send(leaves=why, code=code)
        end_at_once(code, why)

    def close(self) -> None:
        self._closed.set()
        self._line.send(bye=True)

    def _last(self, code: int, **message: str) -> int:
        """Tell rank 0, and wait until it has heard and everyone knows."""
        self._frozen = True
        self._line.send(step=self._stop.step, place="", mark=0)
        self._line.send(**message)
        self._answered.wait(WORD_SECONDS)
        self._closed.set()
        return code

    def _run(self) -> None:
        heard, beaten = time.monotonic(), 0.0
        while not self._closed.is_set():
            try:
                for message in self._line.receive() if readable([self._line]) else []:
                    heard = time.monotonic()
                    if "end" in message:
                        return self._obey(int(message["end"]))
            except EOFError as how:
                return self._leaderless(f"is gone: {how} (killed? out of host memory?)")
            now = time.monotonic()
            if now - heard > self._timeout:
                return self._leaderless(f"does not answer: nothing heard for {now - heard:.0f} s")
            if now - beaten >= BEAT_SECONDS:
                beaten = now
                place, mark = ("", 0) if self._frozen else whereabouts()
                self._line.send(step=self._stop.step, place=place, mark=mark)

    def _obey(self, code: int) -> None:
        """End as rank 0 says, unless this rank ends by itself; 0: rank 0 has ended in order, and so may we."""
        self._word = code
        self._answered.set()
        if code and not self._closed.wait(GRACE_SECONDS):
            end_at_once(code, "")

    def _leaderless(self, how: str) -> None:
        if self._closed.wait(GRACE_SECONDS):
            return
        if self._speaks:
            print(f"{self._leader} {how}; this was {when(self._stop.step)}.", file=sys.stderr, flush=True)
        end_at_once(EXIT_LOST_RANK, "")
