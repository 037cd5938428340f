"""The two files that a person writes for a job on several nodes, in DeepSpeed's formats: checked, line by line.

The hostfile has a line `node1 slots=8` for every node; comments begin with #. `.deepspeed_env` has NAME=VALUE lines for
the environment of the ranks; it is looked for in the home directory and in the current one, under the name that
DS_ENV_FILE gives. A value is read by the node's shell inside double quotes, so `$HOME` and `$(cat ~/.wandb_key)` mean
the node's. The second is how a secret gets there: everybody on a node can read the launcher's command line.
"""

import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from ds_dgemma.errors import UserError, one_line_each, told

FORM = "`node1 slots=8`"
HOST = re.compile(r"([\w.:][\w.:-]*)\s+slots=([1-9][0-9]{0,3})", re.ASCII)
FILTERS = "--num_nodes and --num_gpus, or --include or --exclude, which is NODE, all slots of a host, or NODE:0,2"
VARIABLE = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(\"?)(.*?)\2\s*")
SECRET = re.compile(  # of NAME=VALUE: a name that speaks of one and no $ to read it, or http://user:password@host
    r"\w*?((KEY|SECRET|PASSWORD|CREDENTIAL)S?|TOKEN|PASSWD|PASSPHRASE|(?<![A-Z])(PASS|PWD|PAT|O?AUTH))=[^$]"
    r"|.*://[^/@\s]*:[^$/@\s][^/@\s]*@",
    re.IGNORECASE,
)


def _lines(path: Path, form: str) -> Iterator[tuple[str, str]]:
    """The lines of a file that say something, each with its place."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {told(error)}. It has lines {form}.") from None
    for number, line in enumerate(lines, start=1):
        if line.partition("#")[0].strip():
            yield f"{path}:{number}", line


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots of every host, in the order of the ranks. DeepSpeed would read `slots=8GPUs`, or start no ranks of 0.

    Raises:
        UserError: the file cannot be read, or lines of it are wrong; each is told with its number.
    """
    hosts: dict[str, int] = {}
    problems = []
    for place, line in _lines(path, FORM):
        found = HOST.fullmatch(line.partition("#")[0].strip())
        if not found:
            problems.append(
                f"{place}: {line.strip()[:80]!r} is not {FORM}: a host that ssh knows, and its ranks, 1 to 9999"
            )
        elif found[1].lower() in map(str.lower, hosts):
            problems.append(f"{place}: has a host that an earlier line has: {found[1]}. One line, with all slots")
        else:
            hosts[found[1]] = int(found[2])
    if not hosts and not problems:
        problems.append(f"{path}: no host in it. Write a line per host: {FORM}")
    if problems:
        raise one_line_each("the hostfile", problems)
    return hosts


def select_hosts(
    hosts: dict[str, int], include: str = "", exclude: str = "", num_nodes: int = -1, num_gpus: int = -1
) -> dict[str, list[int]]:
    """The hosts, and which of their slots, that remain of a hostfile after `deepspeed`'s options of these names.

    Raises:
        UserError: the options contradict each other, or name what the hostfile does not have.
    """
    from deepspeed.launcher import runner

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        if (include or exclude) and (num_nodes >= 0 or num_gpus >= 0):
            raise ValueError("filters and numbers together")
        active = dict(runner.parse_inclusion_exclusion(hosts, include, exclude))
        active = dict(runner.apply_num_nodes_and_gpus(active, num_nodes, num_gpus))
        if not active or num_nodes > len(hosts) or any(len(slots) > hosts[host] for host, slots in active.items()):
            raise ValueError(f"the hostfile has {hosts}")
    except ValueError as error:
        raise UserError(f"{FILTERS}: {str(error)[:200]}") from None
    return active


def rank_environment() -> dict[str, str]:
    """What `.deepspeed_env` says, over this virtual environment's PATH, this directory's PYTHONPATH and this NCCL_*.

    Raises:
        UserError: lines that are not NAME=VALUE, and secrets written out.
    """
    values = {name: value for name, value in os.environ.items() if name.startswith("NCCL_")}
    values["PATH"] = f"{Path(sys.executable).parent}:$PATH"
    values["PYTHONPATH"] = ":".join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    name, problems = os.environ.get("DS_ENV_FILE", ".deepspeed_env"), []
    for path in dict.fromkeys(path.resolve() for path in (Path.home() / name, Path(name)) if path.is_file()):
        for place, line in _lines(path, "NAME=VALUE"):
            found = VARIABLE.fullmatch(line)
            if not found:
                problems.append(f"{place}: is not NAME=VALUE, without `export`")
            elif SECRET.match(f"{found[1]}={found[3]}"):
                problems.append(
                    f"{place}: {found[1]} is written out, and every process list would show it. Write "
                    f"{found[1]}=$(cat FILE), which the node reads, or log in on the nodes"
                )
            else:
                values[found[1]] = found[3]
    if problems:
        raise one_line_each("the ranks' environment", problems)
    return values


def exports(values: Mapping[str, str]) -> str:
    """The beginning of a shell's line that has this environment; inside double quotes the shell still expands `$`."""
    return "".join('export {}="{}"; '.format(name, value.replace('"', '\\"')) for name, value in values.items())
