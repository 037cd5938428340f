"""Train on the nodes of a hostfile: check all of them, then start the ranks over pdsh or ssh.

    launch/multinode.sh --hostfile H --config C.yaml [--set a.b=value ...] [--launcher pdsh|ssh] [deepspeed's options]

It starts what `deepspeed --hostfile H --module ds_dgemma.train --config C.yaml ...` would, DeepSpeed's launcher of a
node on every node, over pdsh. Where there is no pdsh, ssh starts the same; DeepSpeed has no launcher of its own for
that. Call it from the directory that relative paths start at; it must exist on every node. SIGTERM, SIGINT or SIGUSR1
stops the run after a checkpoint, a second one at once.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ds_dgemma.config.division import check_expert_groups, check_topology
from ds_dgemma.config.file import load_config
from ds_dgemma.errors import EXIT_STOPPED, EXIT_UNREACHABLE, EXIT_USER_ERROR, UserError, one_line_each
from ds_dgemma.launch import probe
from ds_dgemma.launch.hostfile import exports, rank_environment, read_hostfile, select_hosts
from ds_dgemma.launch.job import JOB, NODE_SECONDS, Nodes, keep_signals, run_job

# A node that lost its power closes no connection: without these ssh would wait for it for ever.
SSH = ("ssh", "-oBatchMode=yes", "-oConnectTimeout=10", "-oServerAliveInterval=15")
TRAIN = "ds_dgemma.train"
# Probes of `probe.py` whose answer must be the same as here. Of a package its version, of code and file a digest.
SAME = [("code", "ds_dgemma"), ("package", "torch"), ("package", "deepspeed"), ("package", "transformers")]
ADVICE = (
    "Nothing was started. Mend the nodes (the same commit and `bash launch/setup.sh` on each, or a directory that they "
    "share; --master_addr and --master_port for rank 0), or take them out of the hostfile (# before the line)."
)
NO_SSH = "ssh does not reach it"
# What ssh says of a host that is down, starting or cut off. All else it says has to be mended, such as its keys.
AWAY = re.compile(
    rf"{NO_SSH}: .*(refused|timed out|timeout|not responding|no route to host|unreachable|host is down|closed|reset"
    "|broken pipe|booting up)",
    re.IGNORECASE,
)


class Unreachable(UserError):
    """Nodes that are away, and nothing else is wrong: the same command may work when they are back."""


def parser() -> argparse.ArgumentParser:
    """The options that are not deepspeed's, or are read otherwise."""
    options = argparse.ArgumentParser("launch/multinode.sh", description=__doc__, allow_abbrev=False)
    options.formatter_class = argparse.RawTextHelpFormatter
    options.add_argument("-H", "--hostfile", type=Path, required=True, help="a line per node: `node1 slots=8`")
    options.add_argument("--config", type=Path, required=True, help="the run's YAML")
    options.add_argument("--set", action="append", default=[], metavar="a.b=value", help="override a setting")
    options.add_argument("--launcher", choices=("pdsh", "ssh"), help="default: pdsh where it is installed")
    return options


def plan(argv: Sequence[str]) -> tuple[str, Nodes, argparse.Namespace]:
    """Check config, hostfile and environment here, then every node: the launcher, the nodes, deepspeed's options.

    Raises:
        UserError: what is wrong, before anything was started; `Unreachable` where nodes are away and all else is well.
    """
    args, rest = parser().parse_known_args(argv)
    if stray := [word for word in rest if word == "--module" or word.endswith(".py")]:
        raise UserError(f"{stray[0]}: launch/multinode.sh starts {TRAIN} and nothing else. Leave it out.")
    config, hosts = load_config(args.config, args.set), read_hostfile(args.hostfile)
    from deepspeed.launcher.runner import parse_args  # takes seconds

    overrides = [word for override in args.set for word in ("--set", override)]
    options = parse_args([*rest, "--module", TRAIN, "--config", str(args.config), *overrides])
    slots = select_hosts(hosts, options.include, options.exclude, options.num_nodes, options.num_gpus)
    check_topology(config, sum(map(len, slots.values())))
    check_expert_groups(config.parallel, {host: len(used) for host, used in slots.items()})
    launcher = args.launcher or ("pdsh" if shutil.which("pdsh") else "ssh")
    if not shutil.which(launcher) or not shutil.which("ssh"):
        raise UserError(f"--launcher {launcher}: not installed here. On Debian and Ubuntu: apt-get install pdsh ssh")
    port = [f"-p{options.ssh_port}"] if options.ssh_port else []
    ssh = (*SSH, *port, *shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", "")))
    nodes = Nodes(slots, ssh, rank_environment(), os.getcwd())
    options.master_addr = options.master_addr or address_of(nodes)
    loopback = [host.startswith(("localhost", "127.", "::1")) for host in (options.master_addr, *slots)]
    if loopback[0] and not all(loopback):
        raise UserError(f"{options.master_addr}, where rank 0 listens, is another machine on every node. Name it.")
    on_gpus = {**os.environ, **nodes.environment}.get("DS_ACCELERATOR") != "cpu"
    check_nodes(nodes, [args.config, config.deepspeed], options.master_addr, options.master_port, on_gpus)
    return launcher, nodes, options


def address_of(nodes: Nodes) -> str:
    """The first host by the name that ssh's configuration has for it, unless ssh reaches it through a proxy."""
    first = next(iter(nodes.slots))
    done = subprocess.run([*nodes.ssh, "-G", first], capture_output=True, text=True)
    settings = {key: value for key, _, value in (line.partition(" ") for line in done.stdout.splitlines())}
    return first if settings.keys() & {"proxycommand", "proxyjump"} else settings.get("hostname", first)


def check_nodes(nodes: Nodes, files: list[Path], address: str, port: int, on_gpus: bool) -> None:
    """Reach all hosts and hold them against this machine; rank 0 will listen on the first, at `address` and `port`.

    Raises:
        UserError: what hinders a start, a line each; `Unreachable` where nodes are away and all else is well.
    """
    same = [*SAME, *(("file", str(file)) for file in files)]
    wanted = [*(probe.answer(*one) for one in same), "well", "well", "well"]
    problems, known, first = [], dict[str, str](), next(iter(nodes.slots))

    def asked(host: str) -> list[tuple[str, Any]]:
        own = [("gpu", max(nodes.slots[host]) if on_gpus else None), ("port", port if host == first else None)]
        return [*same, ("address", address), *own, ("machine", None)]

    with ThreadPoolExecutor(256) as pool:
        answers = list(pool.map(lambda host: _ask(nodes, host, asked(host)), nodes.slots))
    for host, (*found, machine) in zip(nodes.slots, answers, strict=True):
        if not found:  # it did not say which machine it is
            problems.append(f"{host}: {machine}")
        elif (twin := known.setdefault(machine, host)) != host:
            problems.append(f"{host}: is the same machine as {twin}. One line for each, with all of its slots")
        for (name, argument), got, want in zip(asked(host), found, wanted, strict=False):
            problems += [f"{host}: {name} {argument}: {got}, not {want}"] * (got != want)
    if problems:
        told = one_line_each("the nodes", problems, ADVICE)
        raise Unreachable(str(told)) if all(map(AWAY.search, problems)) else told


def _ask(nodes: Nodes, host: str, asked: list[tuple[str, Any]]) -> list[str]:
    """Run probes on a host and return their answers, or one line that says why they do not run."""
    command = nodes.python_on(host, exports(nodes.environment), "-", json.dumps(asked))
    text = Path(probe.__file__).read_text()
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=NODE_SECONDS)
    except subprocess.TimeoutExpired:
        return [f"{NO_SSH}: timed out after {NODE_SECONDS} s"]
    if answers := re.findall(r"^PROBE (.*)$", done.stdout, re.MULTILINE):
        return json.loads(answers[-1])
    said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1].strip()
    if done.returncode == 255:
        return [f"{NO_SSH}: {said}. `ssh {host}` must work without a password"]
    return [f"{nodes.python} in {nodes.directory} does not run: {said}"]


def commands(launcher: str, nodes: Nodes, options: argparse.Namespace) -> list[list[str]]:
    """What to run here to start a job: the line that DeepSpeed has for every node, over pdsh or ssh."""
    from deepspeed.launcher import multinode_runner, runner

    deepspeed = multinode_runner.PDSHRunner(options, runner.encode_world_info(nodes.slots))
    deepspeed.user_arguments = list(map(shlex.quote, options.user_args))
    command, kill, _ = deepspeed.get_cmd({}, nodes.slots)
    pdsh = command[: len(kill) - 2]  # before what the nodes run
    line, number = exports({**nodes.environment, JOB: nodes.job}) + " ".join(command[len(pdsh) :]), "--node_rank=%n"
    if launcher == "pdsh":  # which has its own meaning for %
        pdsh = ["env", "PDSH_RCMD_TYPE=ssh", f"PDSH_SSH_ARGS_APPEND={shlex.join(nodes.ssh[1:])}", *pdsh]
        return [[*pdsh, line.replace("%", "%%").replace(number.replace("%", "%%"), number)]]
    return [[*nodes.ssh, host, line.replace(number, f"--node_rank={rank}")] for rank, host in enumerate(nodes.slots)]


def main(argv: Sequence[str], signals: list[signal.Signals], again: bool = False) -> int:
    """Check, train; 2 for a mistake, 69 where nodes are away (`again`: for mistakes too), otherwise the launcher's."""
    try:
        launcher, nodes, options = plan(argv)
        if signals:
            return EXIT_STOPPED
        print(f"{sum(map(len, nodes.slots.values()))} ranks on {len(nodes.slots)} nodes over {launcher}", flush=True)
        return run_job(commands(launcher, nodes, options), signals, nodes)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return EXIT_UNREACHABLE if again or isinstance(error, Unreachable) else EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], keep_signals()))
