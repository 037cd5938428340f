"""A connection between two ranks that carries JSON objects, a line each, and tells at once when the other end dies.

The system closes a dead process's connections, whatever killed it, so the other end knows; a host that is gone stops
acknowledging, which `TCP_USER_TIMEOUT` bounds. A process that merely hangs keeps its connection.
"""

import json
import os
import socket
import threading
from contextlib import suppress
from typing import Any

from ds_dgemma.errors import told

HOST_SECONDS = 60  # after which a host that acknowledges nothing counts as gone
LONGEST = 65536  # bytes of a message; there is none of this size


class Lifeline:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._rest = b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, HOST_SECONDS * 1000)

    def fileno(self) -> int:
        """For `select`."""
        return self._connection.fileno()

    def send(self, **message: Any) -> None:
        """Send an object; nothing waits for an end that does not read, or is gone."""
        with self._lock, suppress(OSError):
            self._connection.send(json.dumps(message).encode() + b"\n", socket.MSG_DONTWAIT)

    def receive(self) -> list[dict[str, Any]]:
        """What has arrived; waits when nothing has.

        Raises:
            EOFError: the other end is gone; how that was noticed.
        """
        try:
            data = self._connection.recv(LONGEST)
            *lines, self._rest = (self._rest + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except OSError as error:
            raise EOFError(told(error)) from error
        except ValueError as error:
            raise EOFError("it talks something else") from error
        if not data or len(self._rest) > LONGEST:
            raise EOFError("its process ended without a word")
        return [message for message in messages if isinstance(message, dict)]

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


def listen() -> socket.socket:
    """A port for all ranks; on one host nobody outside can reach it."""
    if is_local(os.environ["MASTER_ADDR"]):
        return socket.create_server(("127.0.0.1", 0), backlog=4096)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", 0), backlog=4096)


def call(port: int, seconds: float) -> Lifeline:
    """Connect to rank 0, which runs where the process group's address points.

    Raises:
        OSError: it cannot be reached.
    """
    address = os.environ["MASTER_ADDR"]
    connection = socket.create_connection(("127.0.0.1" if is_local(address) else address, port), timeout=seconds)
    connection.settimeout(None)
    return Lifeline(connection)


def is_local(address: str) -> bool:
    """Whether an address means this host to everyone."""
    return address in ("localhost", "::1", "127.0.0.1")
