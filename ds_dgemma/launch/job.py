"""The processes of one job, on this machine and on its nodes: start them, stop them, leave none behind.

Every process of a job has its id in the environment. That finds the ranks wherever a launcher put them: `deepspeed`
dies of signals without telling its ranks, under pdsh they hang below sshd, and DeepSpeed's own clean-up
(`pkill -f ... deepspeed.launcher.launch`) would end other jobs too.

Every machine of a job has a guard (`python -m ds_dgemma.launch.job ID`) in a session of its own. It outlives who
started the job, SIGKILL included, and reads words from it: `stop`, ask the ranks, those to come too, once each; `end`,
the launchers have ended, kill what is left after a while; `now`, at once. The end of its input means stop and end.
"""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import psutil

JOB = "DS_DGEMMA_JOB"  # in the environment: the id
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
LAUNCHERS_OWN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NEW_SECONDS = 2  # for processes whose ssh was on its way
KILL_SECONDS = 20  # for processes to die of SIGKILL
NODE_SECONDS = 60  # for a node to do something short
# What ranks get to end by themselves when their launcher has ended: a checkpoint's time after a signal that asked for
# one, and otherwise more than they take to notice and to try for one.
ASKED_SECONDS, UNASKED_SECONDS = 660, 30


@dataclass(frozen=True)
class Nodes:
    """The machines of a job besides this one, and how to run something there in the same directory."""

    slots: dict[str, list[int]] = field(default_factory=dict)  # of every host in the order of the ranks: its GPUs
    ssh: tuple[str, ...] = ("ssh",)
    environment: dict[str, str] = field(default_factory=dict)  # of the ranks
    directory: str = "."
    python: str = sys.executable
    job: str = field(default_factory=lambda: uuid.uuid4().hex)

    def python_on(self, host: str, before: str, *arguments: str) -> list[str]:
        """The ssh command that runs Python on a host, in the directory, after a shell's line."""
        run = shlex.join([self.python, *arguments])
        return [*self.ssh, host, f"cd {shlex.quote(self.directory)} || exit; {before} exec {run}"]


def keep_signals() -> list[signal.Signals]:
    """The signals that ask to stop: from now on they come into this list instead of ending the process."""
    received: list[signal.Signals] = []
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup has SIGHUP ignored
            signal.signal(number, lambda number, _: received.append(signal.Signals(number)))
    return received


def run_job(commands: Iterable[Sequence[str]], signals: Sequence[signal.Signals], nodes: Nodes) -> int:
    """Run commands side by side to their end and return the highest exit code.

    The first signal is passed on to the ranks, which all agree on it; a second one ends the job at once. Nothing of the
    job is alive on any node that can be reached when this returns.

    Raises:
        OSError: the system cannot start a command.
    """
    own = {name: value for name, value in os.environ.items() if name not in LAUNCHERS_OWN}
    guards = _start_guards(nodes)
    pipes: dict = {"stdin": subprocess.DEVNULL, "env": {**own, JOB: nodes.job}}
    launchers = [subprocess.Popen(command, start_new_session=True, **pipes) for command in commands]
    said, until = set[str](), float("inf")
    while any(one.poll() is None for one in [*launchers, *guards.values()]) and time.monotonic() < until:
        killed = any((launcher.poll() or 0) < 0 for launcher in launchers)
        if signals or (killed and nodes.slots):  # ranks of other machines do not see that what started them was killed
            _say("stop", guards, said)
        if len(signals) > 1:
            _say("now", guards, said)
        if all(launcher.poll() is not None for launcher in launchers) and "end" not in said:
            _say("end", guards, said)
            until = time.monotonic() + ASKED_SECONDS + KILL_SECONDS + NODE_SECONDS
        time.sleep(0.1)
    if unsure := ", ".join(machine for machine, guard in guards.items() if guard.poll() != 0):
        print(f"cannot tell whether processes of the job are left on {unsure}", file=sys.stderr, flush=True)
    return max(code if code >= 0 else 128 - code for code in (launcher.wait() for launcher in launchers))


def _start_guards(nodes: Nodes) -> dict[str, subprocess.Popen]:
    """The guards by machine; none of them is a process of the job."""
    guard = ("-m", "ds_dgemma.launch.job", nodes.job)
    commands = {"this machine": [sys.executable, *guard, *["launchers"] * bool(nodes.slots)]}
    commands |= {host: nodes.python_on(host, "", *guard) for host in nodes.slots}
    pipes: dict = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "bufsize": 0}
    return {host: subprocess.Popen(line, start_new_session=True, **pipes) for host, line in commands.items()}


def _say(word: str, guards: Mapping[str, subprocess.Popen], said: set[str]) -> None:
    """Say a word to all guards, once."""
    for guard in guards.values() if word not in said else ():
        with suppress(BrokenPipeError):
            assert guard.stdin
            guard.stdin.write(f"{word}\n".encode())
    said.add(word)


def guard(job: str, of: str = "ranks") -> int:
    """Do as the words on standard input say; returns how many processes of the job would not end.

    One of launchers leaves the ranks to the guards of their nodes, though it is on one of these: they are asked once.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    said, asked, ended = set[str](), set[psutil.Process](), time.monotonic()
    threading.Thread(target=_hear, args=(said,), daemon=True).start()
    while "now" not in said:
        left = members(job) if said else []
        if "stop" in said and of == "ranks":
            _signal(ranks(left) - asked, signal.SIGTERM)
            asked |= ranks(left)
        patience = ASKED_SECONDS if "stop" in said else UNASKED_SECONDS
        if "end" not in said:
            ended = time.monotonic()
        elif time.monotonic() - ended > (patience if left else NEW_SECONDS):
            break
        time.sleep(0.2)
    ended = time.monotonic()
    while (left := members(job)) and time.monotonic() - ended < KILL_SECONDS:
        _signal(left, signal.SIGKILL)
        psutil.wait_procs(left, timeout=1)
    return len(left)


def _hear(said: set[str]) -> None:
    for line in sys.stdin:
        said.add(line.strip())
    said.update(("stop", "end"))


def members(job: str) -> list[psutil.Process]:
    """The job's processes on this machine, besides this one."""
    everyone = psutil.process_iter(["environ", "ppid"])  # another user's have no environment
    return [one for one in everyone if (one.info["environ"] or {}).get(JOB) == job and one.pid != os.getpid()]


def ranks(found: Iterable[psutil.Process]) -> set[psutil.Process]:
    """The ranks among the members of a job; not what they started, such as a loader's workers."""
    inside = {one.pid: one for one in found if "RANK" in one.info["environ"]}
    return {one for one in inside.values() if one.info["ppid"] not in inside}


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(number)


if __name__ == "__main__":
    sys.exit(guard(*sys.argv[1:]) > 0)
