"""The hostfile of a job, in the format of the `deepspeed` launcher; what that lets through is refused here.

node1 slots=8   # a comment
node2 slots=8
"""

import logging
import re
from collections.abc import Mapping
from math import gcd
from pathlib import Path

from ds_dgemma.config.run import ParallelSection
from ds_dgemma.errors import UserError, one_line_each, told

FORM = "`node1 slots=8`"
MOST_DIGITS = 4  # of a number of ranks


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots of every host, in the order of the ranks.

    Raises:
        UserError: the file cannot be read, or lines of it are wrong; each is told with its number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text (byte {error.start}). A hostfile has a line per host: {FORM}."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"--hostfile {path} cannot be read: {told(error)}. It has a line per host: {FORM}.") from None
    hosts: dict[str, int] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        problem = _problem(words, hosts)
        if problem:
            problems.append(f"{path}:{number}: {line.strip()[:80]!r} {problem}")
        else:
            hosts[words[0]] = int(words[1].removeprefix("slots="))
    if not hosts and not problems:
        problems.append(f"{path}: no host in it. Write a line per host: {FORM}")
    if problems:
        raise one_line_each("the hostfile", problems)
    return hosts


def _problem(words: list[str], before: dict[str, int]) -> str | None:
    """What is wrong with a line; DeepSpeed would read on after the digits, start 0 ranks, or show a stack trace."""
    host, *settings = words
    if len(settings) != 1 or not settings[0].startswith("slots="):
        return f"is not {FORM}: a host, and the ranks that it runs"
    slots = settings[0].removeprefix("slots=")
    if not (slots.isascii() and slots.isdigit() and len(slots) <= MOST_DIGITS):
        return f"has slots={slots[:20]}: a whole number of ranks is needed, such as its GPUs, below 10,000"
    if int(slots) == 0:
        return "has no slots: a host without ranks is left out (# before the line)"
    if host.lower() in map(str.lower, before):
        return f"has a host that an earlier line has: {host}. One line for each, with all of its slots"
    if host.startswith("-") or not all(letter.isalnum() or letter in "-._:" for letter in host):
        return f"has no name of a host: {host!r}. ssh's users and ports belong in ~/.ssh/config"
    return None


def select_hosts(
    hosts: dict[str, int], include: str = "", exclude: str = "", num_nodes: int = -1, num_gpus: int = -1
) -> dict[str, list[int]]:
    """The hosts, and which of their slots, that remain of a hostfile after `deepspeed`'s options of these names.

    Raises:
        UserError: the options contradict each other, or name what the hostfile does not have.
    """
    if not (include or exclude or num_nodes >= 0 or num_gpus >= 0):
        return {host: list(range(slots)) for host, slots in hosts.items()}
    from deepspeed.launcher import runner

    if (include or exclude) and (num_nodes >= 0 or num_gpus >= 0):
        raise UserError("--include and --exclude do not go with --num_nodes and --num_gpus: choose one way.")
    for option, text in (("--include", include), ("--exclude", exclude)):
        _check_filter(option, text)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        active = runner.parse_inclusion_exclusion(hosts, include, exclude)
    except ValueError as error:
        raise UserError(f"--include, --exclude: {error}.") from None
    active = dict(runner.apply_num_nodes_and_gpus(active, num_nodes, num_gpus))
    if not active:
        raise UserError("--include, --exclude: no host is left of the hostfile.")
    if num_nodes > len(hosts):
        raise UserError(f"--num_nodes {num_nodes}: the hostfile has {len(hosts)} hosts.")
    for host, slots in active.items():
        if len(slots) > hosts[host]:
            raise UserError(f"--num_gpus {num_gpus}: the hostfile gives {host} {hosts[host]} slots.")
    return active


def _check_filter(option: str, text: str) -> None:
    for node in filter(None, text.split("@")):
        if not re.fullmatch(rf"[^:]+(:[0-9]{{1,{MOST_DIGITS}}}(,[0-9]{{1,{MOST_DIGITS}}})*)?", node):
            raise UserError(
                f"{option} {text}: {node!r} is not NODE, all slots of a host, or NODE:0,2, some of them by number from "
                "0. @ joins several."
            )


def check_expert_groups(parallel: ParallelSection, slots: Mapping[str, int]) -> None:
    """Keep every expert group inside one node, unless the config allows otherwise.

    Groups are neighbouring ranks and ranks are numbered node by node, so they fit when they divide every node.

    Raises:
        UserError: the nodes that a group would leave, and what to set.
    """
    ep = parallel.expert_parallel_size
    split = [f"{host} has {count}" for host, count in slots.items() if count % ep]
    if split and not parallel.expert_groups_across_nodes:
        largest = gcd(ep, *slots.values())
        raise UserError(
            f"parallel.expert_parallel_size = {ep}  does not divide the ranks of every node: {', '.join(split)}. Set "
            f"it to {largest}, or let groups reach across nodes: parallel.expert_groups_across_nodes true."
        )
