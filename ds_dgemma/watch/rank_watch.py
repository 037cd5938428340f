"""What rank 0 knows of the other ranks, and its word on why the run ends.

Every rank has a connection to rank 0 (`lifeline.py`) and says once a second which step it makes and where its main
thread is. Rank 0 judges:

    connection closed without a goodbye   the rank is gone: killed, crashed, or its host lost
    "failed"                              it says its error itself, before it ends
    silence                               it was stopped (SIGSTOP), or its host is overloaded: a warning, then the end
    nobody's main thread moves            one hangs and the others wait for it: the end says where each one is

The first judgement is printed, once, and sent to all, who end. What follows from it (collectives that fail because
the other end is gone) is nobody's news.
"""

import os
import select
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from ds_dgemma.errors import EXIT_LOST_RANK, EXIT_USER_ERROR
from ds_dgemma.ranks.stop_request import StopRequest, end_at_once
from ds_dgemma.watch.lifeline import Lifeline

BEAT_SECONDS = 1
WARN_SECONDS = 30  # of silence
SILENT_SECONDS = 5  # of silence, where a collective has failed and somebody must be the cause
CAUSE_SECONDS = 5  # for the cause to be heard after its consequence
CLOSE_SECONDS = 10  # for rank 0's main thread to close metrics and wandb, after the last word
SHOWN_PLACES = 8


@dataclass
class Member:
    """A rank as rank 0 sees it; times are of `time.monotonic`."""

    rank: int
    host: str
    pid: int
    step: int | None = None  # None: before the first
    place: str = ""  # where its main thread is
    mark: int = 0  # of all frames of its main thread
    heard: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)
    warned: bool = False
    suffers: str | None = None  # the error of a collective that failed under it
    ended: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (pid {self.pid})"

    def when(self) -> str:
        """Its step, in words."""
        return when(self.step)

    def beat(self, now: float, step: int | None, place: str, mark: int) -> None:
        """Note what it says of itself."""
        if (step, mark) != (self.step, self.mark):
            self.moved = now
        self.step, self.place, self.mark, self.heard, self.warned = step, place, mark, now, False


class RankWatch:
    """Rank 0's side: a thread that listens to all ranks and judges."""

    def __init__(
        self, members: list[Member], server: socket.socket, token: str, timeout: float, stop: StopRequest
    ) -> None:
        self._members = members
        self._server = server
        self._token = token
        self._timeout = timeout  # seconds that a collective may take
        self._stop = stop
        self._strangers: list[Lifeline] = []
        self._lines: dict[int, Lifeline] = {}
        self._lock = threading.Lock()
        self._verdict: int | None = None
        self._deadline = float("inf")
        self._mistake: tuple[float, str] | None = None
        self._closed = False
        self._frozen = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="rank-watch")
        self._thread.start()

    # The main thread's side

    def conclude(self, code: int, text: str | None) -> int:
        """Say the last word, unless it is said; all others end. Return the exit code of the first word."""
        with self._lock:
            if self._verdict is None:
                self._verdict, self._deadline = code, time.monotonic() + CLOSE_SECONDS
                if text:
                    print(text, file=sys.stderr, flush=True)
                for line in list(self._lines.values()):
                    line.send(end=code)
        return self._verdict

    def say(self, code: int, why: str) -> None:
        """A last word of this process, which ends now."""
        self.conclude(code, None)
        end_at_once(code, why)

    def mistake(self, text: str) -> int:
        """A user's mistake ends this rank."""
        return self.conclude(EXIT_USER_ERROR, text)

    def failed(self, words: str) -> int:
        """This rank's own error ends it."""
        self.conclude(EXIT_LOST_RANK, f"{self._members[0]} failed {when(self._stop.step)}: {words}")
        return 1

    def suffered(self, words: str) -> int:
        """A collective failed under this rank: wait for the cause, or find it."""
        self._frozen = True
        own = self._members[0]
        own.suffers = words
        deadline = time.monotonic() + CAUSE_SECONDS
        while self._verdict is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.conclude(EXIT_LOST_RANK, self._cause(words))

    def close(self) -> None:
        """This rank ends in order."""
        self.conclude(0, None)
        self._closed = True
        self._thread.join(5)

    # The thread's side

    def _run(self) -> None:
        ticked = 0.0
        while not self._closed:
            ready = readable([self._server, *self._strangers, *self._lines.values()])
            for one in ready:
                if one is self._server:
                    self._strangers.append(Lifeline(self._server.accept()[0]))
                elif isinstance(one, Lifeline):
                    self._hear(one)
            now = time.monotonic()
            if now - ticked >= BEAT_SECONDS:
                ticked = now
                self._tick(now)
        for line in [*self._strangers, *self._lines.values()]:
            line.close()
        self._server.close()

    def _hear(self, line: Lifeline) -> None:
        rank = next((rank for rank, known in self._lines.items() if known is line), None)
        try:
            for message in line.receive():
                if rank is None:
                    if message.get("token") != self._token:
                        raise EOFError("a stranger")
                    rank = int(message["rank"])
                    self._strangers.remove(line)
                    self._lines[rank] = line
                    if self._verdict is not None:
                        line.send(end=self._verdict)
                else:
                    self._understand(self._members[rank], message)
        except EOFError as how:
            line.close()
            if rank is None:
                self._strangers.remove(line)
                return
            del self._lines[rank]
            member = self._members[rank]
            if not member.ended:
                member.ended = True
                text = f"{member} is gone: {how}, last seen {member.when()} (killed? out of host memory?)."
                self.conclude(EXIT_LOST_RANK, text)

    def _understand(self, member: Member, message: dict[str, Any]) -> None:
        now = time.monotonic()
        member.heard = now
        match message:
            case {"step": step, "place": place, "mark": mark}:
                member.beat(now, step, place, mark)
            case {"suffers": words}:
                member.suffers = words
            case {"failed": words}:
                member.ended = True
                self.conclude(EXIT_LOST_RANK, f"{member} failed {member.when()}: {words}")
            case {"mistake": text}:
                self._mistake = self._mistake or (now, f"rank {member.rank}: {text}")
            case {"leaves": why, "code": code}:
                member.ended = True
                self.conclude(code, f"{member} {why}.")
            case {"bye": _}:
                member.ended = True

    def _tick(self, now: float) -> None:
        if now > self._deadline and not self._closed and self._verdict:
            end_at_once(self._verdict, "")
        own = self._members[0]
        own.beat(now, self._stop.step, *((own.place, own.mark) if self._frozen else whereabouts()))
        for line in list(self._lines.values()):
            line.send(alive=True)
        if self._verdict is not None:
            return
        if self._mistake and now - self._mistake[0] > 2:  # else rank 0 makes the same one
            self.conclude(EXIT_USER_ERROR, self._mistake[1])
        present = [member for member in self._members if member.rank == 0 or member.rank in self._lines]
        for member in present:
            silence = now - member.heard
            if silence > self._timeout:
                self.conclude(EXIT_LOST_RANK, f"{member} does not answer:{self._silence(member, silence)}.")
            elif silence > WARN_SECONDS and not member.warned:
                member.warned = True
                print(f"warning: {member}:{self._silence(member, silence)}.", file=sys.stderr, flush=True)
        suffering = [member.suffers for member in present if member.suffers]
        stuck = all(member.step is not None and now - member.moved > self._timeout for member in present)
        if stuck or (suffering and now - max(member.moved for member in present) > 2 * CAUSE_SECONDS):
            self.conclude(EXIT_LOST_RANK, self._cause(suffering[0] if suffering else None))

    @staticmethod
    def _silence(member: Member, silence: float) -> str:
        return f" nothing heard for {silence:.0f} s, last seen {member.when()} (stopped? host overloaded?)"

    def _cause(self, error: str | None) -> str:
        """Why a collective failed though every rank lives."""
        now = time.monotonic()
        others = [member for member in self._members[1:] if not member.ended]
        for member in others:
            if (silence := now - member.heard) > SILENT_SECONDS:
                return f"{member} does not answer:{self._silence(member, silence)}."
        if error:
            idle = [member for member in others if not member.suffers]
            if idle:
                member = idle[0]
                return f"{member} hangs {member.when()} at {member.place}: the others waited for it ({error})."
            return f"the connection between ranks broke {self._members[0].when()}: {error}"
        places: dict[str, list[int]] = {}
        for member in self._members:
            places.setdefault(member.place, []).append(member.rank)
        lines = [f"  rank {', '.join(map(str, ranks))}: {place}" for place, ranks in places.items()]
        since = now - max(member.moved for member in self._members)
        heading = f"no rank has moved {self._members[0].when()} for {since:.0f} s; where they are:"
        return "\n".join([heading, *lines[:SHOWN_PLACES]])


def when(step: int | None) -> str:
    """A step in words; None: training has not begun."""
    return "before the first step" if step is None else f"in step {step}"


def readable(ends: list[Any]) -> list[Any]:
    """Which of them have something to read, after a moment at most; `select` would have a largest descriptor."""
    poll = select.poll()
    by_number = {end.fileno(): end for end in ends}
    for number in by_number:
        poll.register(number, select.POLLIN)
    return [by_number[number] for number, _ in poll.poll(BEAT_SECONDS * 1000)]


def whereabouts() -> tuple[str, int]:
    """Where the main thread is, and a mark that changes when it moves."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "", 0
    code = frame.f_code
    place = f"{os.sep.join(code.co_filename.split(os.sep)[-2:])}:{frame.f_lineno} ({code.co_name})"
    marks = []
    while frame is not None:
        marks.append((frame.f_code.co_filename, frame.f_lasti))
        frame = frame.f_back
    return place, hash(tuple(marks))
