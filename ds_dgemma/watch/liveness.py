"""Ranks that look after each other: one that dies or hangs ends all of them in bounded time, with one message.

Without this a collective tells of a dead rank by "Connection closed by peer" on every other rank, or not before its
time-out. Here every rank has a connection to rank 0 and says once a second which step it makes, where its main thread
is, and which error of a collective it suffers from. Rank 0 judges:

    connection closed without a word   the rank is gone: killed, crashed, or its host lost
    a last word                        it says itself why it ends, before it does
    silence                            it was stopped (SIGSTOP), or its host is overloaded: a warning, then the end
    a collective failed under a rank   another one is silent, or hangs elsewhere
    nobody's main thread moves         one hangs and the others wait for it: the end says where they are

The first judgement is printed, once, and sent to all, who end, without a trace of what is only the consequence. The
system closes a dead process's connections, whatever killed it; a host that is gone stops acknowledging, which
`TCP_USER_TIMEOUT` bounds.
"""

import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ds_dgemma.errors import EXIT_LOST_RANK, EXIT_USER_ERROR, UserError, first_line, told
from ds_dgemma.ranks.layout import RankLayout, gather
from ds_dgemma.ranks.stop_request import StopRequest, end_at_once

BEAT_SECONDS = 1
HOST_SECONDS = 60  # after which a host that acknowledges nothing counts as gone
WARN_SECONDS = 30  # of silence
CAUSE_SECONDS = 5  # for the cause to be heard after its consequence; a silence of this length is one
WORD_SECONDS = 20  # for rank 0's word, after this rank's own
GRACE_SECONDS = (10, 1)  # for rank 0, which has metrics and wandb to close, and the others to end after that word
LONGEST = 65536  # characters of a message; there is none of this size
CONSEQUENCE = re.compile(r"gloo|NCCL|TCPStore|Connection (closed|reset) by peer|Broken pipe|Socket Timeout")
GONE = "is gone: killed, out of host memory, or its host is lost; last seen"
MEMORY = (
    "Lower train.micro_batch_size, set train.activation_checkpointing: full, raise parallel.expert_parallel_size, or "
    "offload (ds_configs/README.md); `ds-dgemma plan` tells what fits."
)


@dataclass(eq=False)
class Member:
    """A rank that takes part, as rank 0 sees it; times are of `time.monotonic`."""

    name: str
    rank: int
    connection: socket.socket
    step: int | None = None  # None: before the first
    place: str = ""  # where its main thread is
    error: str = ""  # of a collective that failed under it
    heard: float = field(default_factory=time.monotonic)
    moved: float = 0
    warned: bool = False

    def hear(self, step: int | None, place: str, error: str) -> None:
        """Note what it says of itself."""
        self.heard, self.warned = time.monotonic(), False
        if (step, place, error) != (self.step, self.place, self.error):
            self.step, self.place, self.error, self.moved = step, place, error, self.heard


class Hub:
    """Threads of rank 0 that listen to all ranks and judge."""

    def __init__(self, server: socket.socket, token: str, timeout: float) -> None:
        self._token = token
        self._timeout = timeout  # seconds that a collective may take
        self._members: list[Member] = []
        self._word: int | None = None
        self._lock = threading.Lock()
        _in_background(self._accept, server)
        _in_background(self._watch)

    def _accept(self, server: socket.socket) -> None:
        while True:
            _in_background(self._listen, server.accept()[0])

    def _listen(self, connection: socket.socket) -> None:
        """Hear one rank to its end. A stranger has no token and is not heard."""
        lines = _messages(connection)
        first = next(lines, {})
        if first.get("token") != self._token:
            return
        member = Member(first["name"], first["rank"], connection)
        self._members.append(member)
        for message in lines:
            if "end" in message:
                break
            member.hear(**message)
        else:
            message = {"end": EXIT_LOST_RANK, "why": f"{member.name} {GONE} {when(member.step)}."}
        self._members.remove(member)
        if message["end"] or member.rank == 0:  # all are complete when rank 0 is
            self._conclude(message["end"], message["why"])
        _send(connection, end=self._word or 0)

    def _conclude(self, code: int, why: str) -> None:
        """Say the last word, unless it is said; all ranks end."""
        with self._lock:
            if self._word is None and why:
                print(why, file=sys.stderr, flush=True)
            self._word = code if self._word is None else self._word
        for member in [*self._members]:
            _send(member.connection, end=self._word)

    def _watch(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            present = sorted(self._members, key=lambda member: member.rank)
            for member in present:
                _send(member.connection, **({} if self._word is None else {"end": self._word}))
            if present and (why := self._cause(present, time.monotonic())):
                self._conclude(EXIT_LOST_RANK, why)

    def _cause(self, present: Sequence[Member], now: float) -> str | None:
        """Why the run cannot go on, where it shows by now that it cannot."""
        first = min(present, key=lambda member: member.moved if member.error else now)
        failed = now - first.moved > CAUSE_SECONDS and first.error
        for member in present:
            silence = now - member.heard
            told = f"nothing heard for {silence:.0f} s, last seen {when(member.step)} (stopped? host overloaded?)."
            if silence > (CAUSE_SECONDS if failed else self._timeout):
                return f"{member.name} does not answer: {told}"
            if silence > WARN_SECONDS and not member.warned:
                member.warned = True
                print(f"warning: {member.name}: {told}", file=sys.stderr, flush=True)
        if failed:
            for member in present:
                if not member.error:
                    where = f"{when(member.step)} at {member.place}"
                    return f"{member.name} hangs {where}: the others waited for it ({failed})."
            return f"the connection between ranks broke {when(first.step)}: {failed}"
        still = now - max(member.moved for member in present)
        # Where a collective fails by its time-out (gloo), that comes first.
        if still > self._timeout + CAUSE_SECONDS and all(member.step is not None for member in present):
            there = Counter(member.place for member in present)
            lonely = sorted(present, key=lambda member: there[member.place])[:8]
            places = ", ".join(f"rank {member.rank} at {member.place}" for member in lonely)
            return f"no rank has moved {when(first.step)} for {still:.0f} s: {places}."
        return None


class Liveness(AbstractContextManager):
    """Look after each other while a block runs, and end this rank with an exit code when an exception leaves it.

    A user's mistake is printed without a trace, an exception of this rank's own with one. Raises SystemExit.
    """

    def __init__(self, ranks: RankLayout, timeout_minutes: float, stop: StopRequest) -> None:
        self._rank, self._timeout, self._stop = ranks.rank, timeout_minutes * 60, stop
        self._error = ""  # of a collective that failed
        self._word: int | None = None  # rank 0's: the code with which all end
        self._told = threading.Event()
        self._line: socket.socket | None = None
        self._me = ""
        if ranks.world > 1:
            self._connect(ranks)
        if self._line:
            stop.leave = self._leave

    def _connect(self, ranks: RankLayout) -> None:
        server, own, address = None, None, os.environ["MASTER_ADDR"]
        if ranks.is_main:
            server = _server(address)
            own = server.getsockname()[1], secrets.token_hex()
        name = f"rank {ranks.rank} on {socket.gethostname()} (pid {os.getpid()})"
        self._leader, (port, token) = gather((name, own), ranks)[0]
        if server:
            Hub(server, token, self._timeout)
        try:
            self._line = socket.create_connection((address, port), timeout=HOST_SECONDS)
        except OSError as error:  # a firewall, say: training has other ports
            where = f"{address}, port {port}: {told(error)}"
            print(
                f"warning: {name} cannot reach rank 0 at {where}. No one will see it hang.", file=sys.stderr, flush=True
            )
            return
        self._line.settimeout(None)
        _send(self._line, token=token, rank=ranks.rank, name=name)
        self._me, self._heard = f"{name} ", time.monotonic()
        _in_background(self._listen, self._line)
        _in_background(self._beat)

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None and not isinstance(error, SystemExit):
            raise SystemExit(self._fail(error))
        self._last(end=0, why="")

    def _fail(self, error: BaseException) -> int:
        """End by an exception; returns the exit code."""
        if isinstance(error, UserError):
            self._told.wait(2 * min(self._rank, 1))  # rank 0 may make the same one, and tell it without a number
            self._last(end=EXIT_USER_ERROR, why=f"rank {self._rank}: {error}" if self._rank else str(error))
            return EXIT_USER_ERROR
        words = f"{type(error).__name__}: {first_line(error)}"
        collective = isinstance(error, RuntimeError | ConnectionError) and CONSEQUENCE.search(str(error))
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            words = f"{words}. {MEMORY}"
        elif self._line and (collective or isinstance(error, dist.DistError)):
            self._error = words  # of another rank's making, as long as nothing else is known
            self._last(step=self._stop.step, place="", error=words)
            return self._word or EXIT_LOST_RANK
        else:
            sys.excepthook(type(error), error, error.__traceback__)
        self._last(end=EXIT_LOST_RANK, why=f"{self._me}failed {when(self._stop.step)}: {words}")
        return 1

    def _last(self, **message: Any) -> None:
        """Tell rank 0 how this rank ends, and wait until everyone knows."""
        if self._line:
            _send(self._line, **message)
            self._told.wait(WORD_SECONDS)
        elif message["why"]:
            print(message["why"], file=sys.stderr, flush=True)

    def _leave(self, code: int, why: str) -> None:
        """A last word of this process, which ends now."""
        _send(self._line, end=code, why=f"{self._me}{why}.")
        self._told.wait(BEAT_SECONDS)
        end_at_once(code, "")

    def _listen(self, line: socket.socket) -> None:
        """Until rank 0's word, or its death."""
        for message in _messages(line):
            self._heard = time.monotonic()
            if "end" in message:
                return self._obey(message["end"])
        self._obey(EXIT_LOST_RANK, GONE)

    def _beat(self) -> None:
        while not self._told.wait(BEAT_SECONDS):
            _send(self._line, step=self._stop.step, place=_place(), error=self._error)
            silence = time.monotonic() - self._heard
            if silence > self._timeout:
                self._obey(EXIT_LOST_RANK, f"does not answer: nothing heard for {silence:.0f} s")

    def _obey(self, code: int, how: str = "") -> None:
        """End as rank 0 says, or because of how it is, unless this rank ends by itself; 0: it has ended in order."""
        if how and self._rank == 1:  # one speaks for it
            print(f"{self._leader} {how} {when(self._stop.step)}.", file=sys.stderr, flush=True)
        self._word = code
        self._told.set()
        if code:
            time.sleep(GRACE_SECONDS[min(self._rank, 1)])
            end_at_once(code, "")


def _server(address: str) -> socket.socket:
    """A server for the ranks: on this machine alone where they all are, else on all its interfaces."""
    if address in ("localhost", "127.0.0.1"):
        return socket.create_server(("127.0.0.1", 0), backlog=4096)
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=4096)


def when(step: int | None) -> str:
    """A step in words; None: training has not begun."""
    return "before the first step" if step is None else f"in step {step}"


def _place() -> str:
    """Where the main thread is."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    file = os.sep.join(frame.f_code.co_filename.split(os.sep)[-2:])
    return f"{file}:{frame.f_lineno} ({frame.f_code.co_name})"


def _in_background(task: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=task, args=arguments, daemon=True, name="liveness").start()


def _send(connection: socket.socket | None, **message: Any) -> None:
    """Send an object; nothing waits for an end that does not read, or is gone."""
    if connection:
        with suppress(OSError):
            connection.send(json.dumps(message).encode() + b"\n", socket.MSG_DONTWAIT)


def _messages(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """The JSON objects that arrive, a line each, until the other end is gone, however that shows."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, HOST_SECONDS * 1000)
    with suppress(OSError, ValueError), connection, connection.makefile(encoding="utf-8") as lines:
        while (line := lines.readline(LONGEST)) and isinstance(message := json.loads(line), dict):
            yield message
