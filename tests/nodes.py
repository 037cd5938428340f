"""Two nodes in one machine for tests: an ssh server of their own on 127.0.0.1 and 127.0.0.2, and its client's settings.

Keys, port and configuration are temporary; nobody's ~/.ssh is read or written.
"""

import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

HOSTS = ("127.0.0.1", "127.0.0.2")
SERVER = """
Port {port}
ListenAddress {hosts[0]}
ListenAddress {hosts[1]}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
"""
CLIENT = """
Host *
  Port {port}
  IdentityFile {folder}/user
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking accept-new
  LogLevel ERROR
"""
SEPARATION = Path("/run/sshd")  # an empty directory that root's sshd wants; the system's service makes it too


def find_server() -> str:
    """The path of sshd; skips the test with a reason where something is missing."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin"
    for program in ("ssh", "ssh-keygen", "pdsh", "sshd"):
        if not shutil.which(program, path=path):
            pytest.skip(f"{program} is not installed (apt-get install openssh-server pdsh)")
    server = shutil.which("sshd", path=path)
    assert server
    return server


@pytest.fixture(scope="module")
def ssh_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An ssh client's configuration that reaches both addresses, for as long as the module's tests run."""
    server, folder = find_server(), tmp_path_factory.mktemp("ssh")
    if os.geteuid() == 0:
        SEPARATION.mkdir(mode=0o755, exist_ok=True)  # and it stays: another session's server may need it
    port = steady_port()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "server").write_text(SERVER.format(port=port, hosts=HOSTS, folder=folder))
    (folder / "client").write_text(CLIENT.format(port=port, folder=folder))
    process = subprocess.Popen([server, "-D", "-f", folder / "server", "-E", folder / "log"])
    try:
        wait_for_port(HOSTS[1], port, process, folder / "log")
        yield folder / "client"
    finally:
        process.kill()
        process.wait()


def steady_port() -> int:
    """A free port that stays free while ranks start: below those that the system gives to outgoing connections."""
    for port in random.sample(range(20000, 30000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    pytest.fail("no free port")


def wait_for_port(host: str, port: int, process: subprocess.Popen, log: Path) -> None:
    for _ in range(100):
        if process.poll() is not None:
            pytest.skip(f"sshd does not start here: {log.read_text().strip()[-200:]}")
        with socket.socket() as probe:
            if probe.connect_ex((host, port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"sshd does not listen: {log.read_text()}")
