"""The processes of one job, on this machine and on its nodes: start them, stop them, leave none behind.

Every process of a job has its id in the environment. That finds the ranks wherever a launcher put them: `deepspeed`
dies of signals without telling its ranks, under pdsh they hang below sshd, and DeepSpeed's own clean-up
(`pkill -f ... deepspeed.launcher.launch`) would end other jobs too. A guard process outlives whoever started the job,
SIGKILL included, and ends what is left of it.

    python -m ds_dgemma.launch.job stop ID             ask the ranks of this machine to stop: SIGTERM, once
    python -m ds_dgemma.launch.job kill ID SECONDS     end what is left of the job on this machine after so long
    python -m ds_dgemma.launch.job guard ID NODES      wait for the end of standard input, then do so on all nodes
"""

import errno
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from threading import Event
from types import FrameType

import psutil

from ds_dgemma.errors import UserError, told

JOB = "DS_DGEMMA_JOB"  # in the environment of every process of a job: its id
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
LAUNCHERS_OWN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
KILL_SECONDS = 20  # for processes to die of SIGKILL
NODE_SECONDS = 60  # for a short command on a node
MODULE = "ds_dgemma.launch.job"  # as a program it is called __main__
# What ranks get to end by themselves when their launcher has ended: a checkpoint's time after a signal that asked for
# one, and otherwise more than they take to notice and to try for one.
ASKED_SECONDS, UNASKED_SECONDS = 660, 30


@dataclass(frozen=True)
class Nodes:
    """The machines of a job besides this one, and how to run something there in the same directory."""

    hosts: tuple[str, ...] = ()
    ssh: tuple[str, ...] = ("ssh",)
    directory: str = "."
    python: str = sys.executable

    def command(self, host: str, line: str) -> list[str]:
        """The ssh command that runs a shell's line on a host."""
        return [*self.ssh, host, line]

    def here(self, *arguments: str) -> str:
        """A shell's line that runs this module on a node."""
        return f"cd {shlex.quote(self.directory)} && exec {shlex.join([self.python, '-m', MODULE, *arguments])}"


class Signals:
    """The signals that ask to stop, kept from now on instead of ending the process."""

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        self._arrived = Event()
        for number in STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup has SIGHUP ignored
                signal.signal(number, self._keep)

    def _keep(self, number: int, _: FrameType | None) -> None:
        self.received.append(signal.Signals(number))
        self._arrived.set()

    def sleep(self, seconds: float) -> None:
        """Wait so long, or until the first signal."""
        self._arrived.wait(seconds)


def run_job(
    commands: Sequence[Sequence[str]], environment: Mapping[str, str], signals: Signals, nodes: Nodes, job: str
) -> int:
    """Run commands side by side to their end and return the highest exit code.

    The first signal is passed on to the ranks, which all agree on it; a second one ends the job at once. Nothing of the
    job is alive on any node that can be reached when this returns.

    Raises:
        UserError: the system cannot start a command.
    """
    surroundings = {name: value for name, value in environment.items() if name not in LAUNCHERS_OWN}
    guard = _start_guard(job, nodes)
    processes: list[subprocess.Popen] = []
    seconds = UNASKED_SECONDS
    try:
        for command in commands:
            processes.append(_start(command, {**surroundings, JOB: job}))
        while any(process.poll() is None for process in processes):
            if signals.received and seconds == UNASKED_SECONDS:
                seconds = ASKED_SECONDS if _ask_ranks(job, nodes) else 0  # no rank has begun: nothing to save
            if seconds == 0 or len(signals.received) > 1:
                seconds = 0
                break
            time.sleep(0.2)
        if seconds == UNASKED_SECONDS and nodes.hosts and any((process.returncode or 0) < 0 for process in processes):
            _ask_ranks(job, nodes)  # those of other machines do not see that what started them was killed
            seconds = ASKED_SECONDS
    finally:
        _dismiss(guard, seconds, signals)
        codes = [process.wait() for process in processes]
    return max(code if code >= 0 else 128 - code for code in codes)


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen:
    try:
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        reason = "it is a script without a first line such as #!/usr/bin/env bash"
        raise UserError(
            f"{command[0]} cannot be started: {reason if error.errno == errno.ENOEXEC else told(error)}."
        ) from None


def _dismiss(guard: subprocess.Popen, seconds: int, signals: Signals) -> None:
    """Let the guard end what is left after so many seconds, or at once when a second signal comes."""
    assert guard.stdin is not None
    with suppress(BrokenPipeError):
        guard.stdin.write(f"{seconds}\n")
        guard.stdin.flush()
    while guard.poll() is None:
        if len(signals.received) > 1:
            guard.stdin.close()  # no more time
        time.sleep(0.05)


def new_job() -> str:
    """An id that no other job has."""
    return uuid.uuid4().hex


def _start_guard(job: str, nodes: Nodes) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != JOB}
    command = [sys.executable, "-m", MODULE, "guard", job, json.dumps(asdict(nodes))]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True, text=True
    )


def _ask_ranks(job: str, nodes: Nodes) -> bool:
    """Signal the ranks of one node, this one where it has any: they tell the others."""
    if stop(job):
        return True
    for host in nodes.hosts:
        try:
            done = subprocess.run(
                nodes.command(host, nodes.here("stop", job)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                timeout=NODE_SECONDS,
            )
        except subprocess.TimeoutExpired:
            continue
        if done.returncode == 0:
            return True
    return False


def members(job: str) -> list[psutil.Process]:
    """The job's processes on this machine, besides this one."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(JOB) == job:
                found.append(process)
        except (psutil.Error, OSError):  # gone meanwhile, or another user's
            continue
    return found


def ranks(job: str) -> list[psutil.Process]:
    """The job's ranks on this machine; not what they started, such as a loader's workers."""

    def is_rank(process: psutil.Process | None) -> bool:
        return process is not None and "RANK" in process.environ()

    found = []
    for process in members(job):
        try:
            if is_rank(process) and not is_rank(process.parent()):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def stop(job: str) -> int:
    """Ask the ranks of this machine to stop, and return how many there are."""
    found = ranks(job)
    for rank in found:
        try:
            rank.send_signal(signal.SIGTERM)
        except psutil.Error:
            continue
    return len(found)


def kill(job: str, seconds: float, hurry: Callable[[], bool] = bool) -> int:
    """End every process of the job that is left on this machine after so long, or from when there is a hurry.

    Returns how many would not end.
    """
    began = time.monotonic()
    while (left := members(job)) and time.monotonic() - began < seconds and not hurry():
        psutil.wait_procs(left, timeout=0.5)
    began = time.monotonic()
    while (left := members(job)) and time.monotonic() - began < KILL_SECONDS:
        for process in left:
            try:
                process.kill()
            except psutil.Error:
                continue
        psutil.wait_procs(left, timeout=1)
    return len(left)


def guard(job: str, nodes: Nodes) -> int:
    """Wait for a line on standard input, the seconds that the job has left, and end it everywhere.

    Without a line, its starter was killed: the ranks are asked to stop. The end of the input takes the seconds back.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    first = sys.stdin.readline()
    orphaned = not first
    if orphaned:
        _ask_ranks(job, nodes)
    seconds = ASKED_SECONDS if orphaned else int(first)

    def hurry() -> bool:
        return not orphaned and bool(select.select([sys.stdin], [], [], 0)[0])

    with ThreadPoolExecutor(2 * len(nodes.hosts) + 1) as pool:
        waiting = [pool.submit(_kill_on, nodes, host, job, seconds) for host in nodes.hosts]
        left_here = kill(job, seconds, hurry)
        while not all(future.done() for future in waiting):
            if hurry():
                list(pool.map(lambda host: _kill_on(nodes, host, job, 0), nodes.hosts))
                break
            time.sleep(0.1)
        failed = [host for host, future in zip(nodes.hosts, waiting, strict=True) if not future.result()]
    if failed or left_here:
        where = ", ".join(["this machine"] * bool(left_here) + failed)
        print(f"cannot tell whether processes of the job are left on {where}", file=sys.stderr, flush=True)
    return len(failed) + left_here


def _kill_on(nodes: Nodes, host: str, job: str, seconds: int) -> bool:
    with subprocess.Popen(nodes.command(host, nodes.here("kill", job, str(seconds))), stdin=subprocess.DEVNULL) as ssh:
        try:
            return ssh.wait(seconds + NODE_SECONDS) == 0
        except subprocess.TimeoutExpired:
            ssh.kill()
            return False


def main(action: str, job: str, argument: str = "0") -> int:
    """One action for one job; 0 when it was done."""
    if action == "stop":
        return 0 if stop(job) else 1
    if action == "kill":
        return 1 if kill(job, float(argument)) else 0
    return guard(job, Nodes(**json.loads(argument)))  # lists for tuples, which serve as well


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
