"""Ask every node of a hostfile, all at once, whether a job can start there; nothing is started before all said yes."""

import json
import re
import shlex
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ds_dgemma.errors import UserError, one_line_each
from ds_dgemma.launch import probe
from ds_dgemma.launch.environment import exports
from ds_dgemma.launch.job import NODE_SECONDS, Nodes

PACKAGES = ("torch", "deepspeed", "transformers")
NO_DIRECTORY, NO_PYTHON = 91, 92  # exit codes of the probe's shell
ADVICE = "Nothing was started. Mend the nodes, or take them out of the hostfile (# before the line)."

# What ssh says of a host that is down, starting or cut off. All else it says has to be mended, such as its keys.
AWAY = re.compile(
    r"refused|timed out|timeout|not responding|no route to host|unreachable|host is down|closed|reset|broken pipe"
    r"|booting up",
    re.IGNORECASE,
)
T = TypeVar("T")


class Unreachable(UserError):
    """Nodes that are away, and nothing else is wrong: the same command may work when they are back."""


@dataclass(frozen=True)
class Expected:
    """What every node must agree on."""

    slots: dict[str, list[int]]
    files: tuple[Path, ...]
    address: str  # where rank 0 will listen
    port: int
    on_gpus: bool
    environment: Mapping[str, str]  # of the ranks


def ssh_place(nodes: Nodes, host: str) -> tuple[str, str] | None:
    """The name and port that ssh connects to by its configuration (an alias has others); None where a proxy does."""
    done = subprocess.run([*nodes.ssh, "-G", host], capture_output=True, text=True)
    settings = {key: value for key, _, value in (line.partition(" ") for line in done.stdout.splitlines())}
    if settings.keys() & {"proxycommand", "proxyjump"}:
        return None
    return settings.get("hostname", host), settings.get("port", "22")


def _addresses(place: tuple[str, str] | None) -> set[tuple[Any, str]]:
    """The addresses of a name, with its port: behind one address may be several machines. Empty if unknown here."""
    try:
        return {(found[4][0], place[1]) for found in socket.getaddrinfo(place[0], None)} if place else set()
    except OSError:
        return set()


def check_nodes(nodes: Nodes, expected: Expected) -> None:
    """Look up, reach and compare all hosts in parallel.

    Raises:
        UserError: every host that is not ready, a line each; `Unreachable` where all of them are only away.
    """
    here = probe.answer(_question(expected, first=False))
    places = _by_host(lambda host: ssh_place(nodes, host), nodes.hosts)
    addresses = _by_host(lambda host: _addresses(places[host]), nodes.hosts)

    def check(host: str) -> UserError | None:
        before = nodes.hosts[: nodes.hosts.index(host)]
        twin = next((other for other in before if addresses[other] & addresses[host]), None)
        try:
            if twin:
                raise UserError(f"is the same machine as {twin}. One line for each, with all of its slots")
            _check_node(nodes, host, places[host], expected, here)
        except UserError as error:
            return error

    problems = {host: error for host, error in _by_host(check, nodes.hosts).items() if error}
    if problems:
        told = one_line_each("the nodes", [f"{host}: {error}" for host, error in problems.items()], ADVICE)
        away = all(isinstance(error, Unreachable) for error in problems.values())
        raise Unreachable(str(told)) if away else told


def _by_host(function: Callable[[str], T], hosts: Sequence[str]) -> dict[str, T]:
    """What a function says of every host, asked of all at once."""
    with ThreadPoolExecutor(min(len(hosts), 256)) as pool:
        return dict(zip(hosts, pool.map(function, hosts), strict=True))


def _check_node(
    nodes: Nodes, host: str, place: tuple[str, str] | None, expected: Expected, here: dict[str, Any]
) -> None:
    if place and not probe.resolves(place[0]):
        alias = "" if place[0] == host else f" ({place[0]} by ssh's configuration)"
        raise UserError(f"this name has no address{alias}. Correct it, or add it to DNS or /etc/hosts")
    there = _ask(nodes, host, expected)
    if there["package"] is None:
        raise UserError(f"{nodes.python} there has no ds_dgemma. Run `bash launch/setup.sh` there")
    for package in PACKAGES:
        if there["versions"][package] != here["versions"][package]:
            found = there["versions"][package] or "none"
            raise UserError(f"has {package} {found}, here it is {here['versions'][package]}. Install the same")
    if there["package"] != here["package"]:
        raise UserError("has other code of ds_dgemma than this machine. Bring both to the same commit")
    for path, digest in there["files"].items():
        if digest != here["files"][path]:
            raise UserError(f"{path} {'is missing there' if digest is None else 'is another file there than here'}")
    if not there["resolves"]:
        raise UserError(f"cannot look up {expected.address}, where rank 0 will listen. Name an address: --master_addr")
    if not there["port_is_free"]:
        raise UserError(f"port {expected.port} is in use. Stop what has it, or choose another: --master_port")
    last = max(expected.slots[host])
    if expected.on_gpus and there["gpus"] is not None and there["gpus"] <= last:
        raise UserError(
            f"has {there['gpus']} GPUs, and the job wants number {last}, from 0. Correct slots= or --include"
        )


def _question(expected: Expected, first: bool) -> dict[str, Any]:
    return {
        "packages": PACKAGES,
        "package": "ds_dgemma",
        "files": list(map(str, expected.files)),
        "port": expected.port if first else None,
        "address": expected.address,
    }


def _ask(nodes: Nodes, host: str, expected: Expected) -> dict[str, Any]:
    """Run the probe on a host and read its answer."""
    python, directory = shlex.quote(nodes.python), shlex.quote(nodes.directory)
    question = json.dumps(_question(expected, first=host == nodes.hosts[0]))
    line = (
        f"cd {directory} || exit {NO_DIRECTORY}; test -x {python} || exit {NO_PYTHON}; "
        f"{exports(expected.environment)}exec {python} - {shlex.quote(question)}"
    )
    text = Path(probe.__file__).read_text()
    try:
        done = subprocess.run(
            nodes.command(host, line), input=text, capture_output=True, text=True, timeout=NODE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise Unreachable(f"did not answer within {NODE_SECONDS} s") from None
    said = done.stderr.strip().splitlines()
    last = said[-1].strip() if said else f"exit code {done.returncode}"
    if done.returncode == 255:
        kind = Unreachable if AWAY.search(last) else UserError
        raise kind(f"ssh does not reach it: {last}. `ssh {host}` must work without a password")
    if done.returncode == NO_DIRECTORY:
        raise UserError(f"there is no {nodes.directory}: the job needs the same directory on every node")
    if done.returncode == NO_PYTHON:
        raise UserError(f"there is no {nodes.python}: run `bash launch/setup.sh` there, or share the directory")
    answers = [line for line in done.stdout.splitlines() if line.startswith("PROBE ")]
    if done.returncode or not answers:
        raise UserError(f"{nodes.python} does not run: {last}")
    return json.loads(answers[-1].removeprefix("PROBE "))


def address_of(nodes: Nodes) -> str:
    """Where rank 0 listens: the first host, by the name that ssh knows it under."""
    first = nodes.hosts[0]
    place = ssh_place(nodes, first)
    return place[0] if place else first
