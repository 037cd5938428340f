"""Processes for tests, forked from one that has torch, DeepSpeed and this project imported: seconds less for each.

    process = start(["ds_dgemma.train", "--config", ...], environment, log)

runs a module as `python -m` would, in a process of its own with its own environment, output and exit code; the methods
are `subprocess.Popen`'s. The server is started by the first call, or for a whole session by `share`; it has run no
operation and no thread of torch's when it forks, and ends with the process that started it. Where an environment
differs in what libraries read as they are imported, another server serves it. Run as a module, this file is the server.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO

REPOSITORY = Path(__file__).resolve().parent.parent
IMPORTED = (
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # every engine imports it, and torch's compiler with it
    "peft",
    "torch.utils.cpp_extension",
    "transformers.models.diffusion_gemma.modeling_diffusion_gemma",
    "ds_dgemma.train",
    "ds_dgemma.cli",
    "ds_dgemma.checkpoint.export",
)
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_")  # how the names of such variables begin
LONGEST_IMPORT = 300  # seconds
SHARED = "DS_DGEMMA_TEST_FORKS"  # the address of a server that others started, and what it read


class Process:
    """A forked process, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.pid: int = json.loads(connection.makefile("rb", buffering=0).readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._read(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._read(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return code

    def _read(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._connection], [], [], timeout)[0]:
            self.returncode = json.loads(self._connection.makefile("rb").readline())
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(arguments: list[str], environment: dict[str, str], output: IO[bytes], folder: Path = REPOSITORY) -> Process:
    """Run a module with its arguments in a folder; `output` gets all that it says."""
    read = _read_at_import(environment)
    address, read_by_shared = json.loads(os.environ.get(SHARED, "[null, null]"))
    connection = _connected(address if read == read_by_shared else _server(json.dumps(read)))
    message = json.dumps([arguments, environment, str(folder)]).encode() + b"\n"
    socket.send_fds(connection, [message[:1]], [output.fileno()])
    connection.sendall(message[1:])
    return Process(connection)


def share() -> None:
    """Start a server for all processes that this one will start."""
    read = _read_at_import(dict(os.environ))
    os.environ[SHARED] = json.dumps([_server(json.dumps(read)), read])


def _connected(address: str) -> socket.socket:
    """A connection to a server, which may still be importing."""
    deadline = time.monotonic() + LONGEST_IMPORT
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
        except OSError:
            connection.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return connection


def _read_at_import(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in sorted(environment.items()) if name.startswith(READ_AT_IMPORT)}


@cache
def _server(read_at_import: str) -> str:
    folder = tempfile.TemporaryDirectory(prefix="forks-")
    address = f"{folder.name}/socket"
    command = [sys.executable, "-m", "tests.forks", address]
    others = {name: value for name, value in os.environ.items() if not name.startswith(READ_AT_IMPORT)}
    environment = {**others, **json.loads(read_at_import)}
    server = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdin=subprocess.PIPE)

    def end() -> None:
        server.kill()
        server.wait()
        folder.cleanup()

    atexit.register(end)
    return address


def serve(address: str) -> None:
    """Fork for every connection, and send the exit code when the child is gone; end with the standard input."""
    for module in IMPORTED:
        __import__(module)
    gc.freeze()  # what is imported stays: no child looks through it
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    wake, woken = socket.socketpair()
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    children: dict[int, socket.socket] = {}
    while True:
        ready = select.select([listener, woken, sys.stdin], [], [])[0]
        if sys.stdin in ready:
            return
        if woken in ready:
            woken.recv(4096)
            _reap(children)
        if listener in ready:
            connection, _ = listener.accept()
            first, (output,), _, _ = socket.recv_fds(connection, 1, 1)
            arguments, environment, folder = json.loads(first + connection.makefile("rb").readline())
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for other in (listener, wake, woken, connection, *children.values()):
                    other.close()
                os.chdir(folder)
                _run(arguments, environment, output)
            os.close(output)
            children[pid] = connection
            connection.sendall(f"{pid}\n".encode())


def _reap(children: dict[int, socket.socket]) -> None:
    for pid, connection in list(children.items()):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            del children[pid]
            with suppress(OSError):  # nobody waits any more
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            connection.close()


def _run(arguments: list[str], environment: dict[str, str], output: int) -> None:
    """Become `python -m arguments`; does not return."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run with it ignored
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = list(arguments)
        warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)
        try:
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
            if isinstance(ending.code, str):
                print(ending.code, file=sys.stderr)
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
