"""Train on the nodes of a hostfile: check all of them, then start the ranks over pdsh or ssh.

    launch/multinode.sh --hostfile H --config C.yaml [--set a.b=value ...] [--launcher pdsh|ssh] [deepspeed's options]

It runs `deepspeed --hostfile H --module ds_dgemma.train --config C.yaml ...`, which starts every node over pdsh. Where
there is no pdsh, ssh starts the same per-node launcher; DeepSpeed has no launcher of its own for that. Call it from
the directory that relative paths start at; it must exist on every node. SIGTERM, SIGINT or SIGUSR1 stops the run
after a checkpoint, a second one at once.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
from base64 import urlsafe_b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ds_dgemma.config.division import check_topology
from ds_dgemma.config.file import load_config
from ds_dgemma.errors import EXIT_UNREACHABLE, EXIT_USER_ERROR, UserError
from ds_dgemma.launch.environment import (
    environment_files,
    exports,
    for_pdsh,
    rank_environment,
    without_exports,
    write_for_deepspeed,
)
from ds_dgemma.launch.hostfile import check_expert_groups, read_hostfile, select_hosts
from ds_dgemma.launch.job import JOB, Nodes, Signals, new_job, run_job
from ds_dgemma.launch.nodes import Expected, Unreachable, address_of, check_nodes

PORT = 29500  # DeepSpeed's default
CONNECT_SECONDS = 10
# A node that lost its power closes no connection: without these ssh would wait for it for ever.
SSH_OPTIONS = ("-oBatchMode=yes", f"-oConnectTimeout={CONNECT_SECONDS}", "-oServerAliveInterval=15")
TRAIN = "ds_dgemma.train"


@dataclass(frozen=True)
class Plan:
    """A job that passed all checks."""

    launcher: str
    slots: dict[str, list[int]]  # of every host in the order of the ranks: which of its GPUs
    address: str
    port: int
    nodes: Nodes
    environment: dict[str, str]  # of the ranks
    options: list[str]  # for deepspeed
    arguments: list[str]  # for the training


def parser() -> argparse.ArgumentParser:
    """The options that this needs itself; all others are deepspeed's."""
    options = argparse.ArgumentParser(
        prog="launch/multinode.sh",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    options.add_argument("-H", "--hostfile", type=Path, required=True, help="a line per node: `node1 slots=8`")
    options.add_argument("--config", type=Path, required=True, help="the run's YAML")
    options.add_argument("--set", action="append", default=[], metavar="a.b=value", help="override a setting")
    options.add_argument("--launcher", choices=("pdsh", "ssh"), help="default: pdsh where it is installed")
    options.add_argument("-i", "--include", default="", help="as deepspeed has it: node1@node2:0,1")
    options.add_argument("-e", "--exclude", default="")
    options.add_argument("--num_nodes", type=int, default=-1)
    options.add_argument("--num_gpus", "--num_accelerators", type=int, default=-1)
    options.add_argument("--master_addr", help="where rank 0 listens; default: the first host's name")
    options.add_argument("--master_port", type=int, default=PORT)
    options.add_argument("--ssh_port", type=int)
    return options


def plan(argv: Sequence[str]) -> Plan:
    """Check config, hostfile and environment here, then every node.

    Raises:
        UserError: what is wrong, before anything was started; `Unreachable` where nodes are away and all else is well.
    """
    args, rest = parser().parse_known_args(argv)
    if stray := [word for word in rest if word == "--module" or word.endswith(".py")]:
        raise UserError(f"{stray[0]}: launch/multinode.sh starts {TRAIN} and nothing else. Leave it out.")
    config = load_config(args.config, args.set)
    slots = select_hosts(read_hostfile(args.hostfile), args.include, args.exclude, args.num_nodes, args.num_gpus)
    check_topology(config, sum(map(len, slots.values())))
    check_expert_groups(config.parallel, {host: len(used) for host, used in slots.items()})
    launcher = args.launcher or ("pdsh" if shutil.which("pdsh") else "ssh")
    if not shutil.which(launcher) or not shutil.which("ssh"):
        raise UserError(f"--launcher {launcher}: not installed here. On Debian and Ubuntu: apt-get install pdsh ssh")
    environment = rank_environment(environment_files())
    if launcher == "ssh" and rest:
        raise UserError(f"{rest[0]}: an option of deepspeed's launcher, which needs pdsh. Install it, or leave it out.")
    port = [f"-p{args.ssh_port}"] if args.ssh_port else []
    ssh = ("ssh", *SSH_OPTIONS, *port, *shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", "")))
    nodes = Nodes(tuple(slots), ssh, os.getcwd(), sys.executable)
    address = args.master_addr or address_of(nodes)
    if is_loopback(address) and not all(map(is_loopback, slots)):
        raise UserError(
            f"{address} means another machine on every node: rank 0 listens there. Use the first node's name."
        )
    files = (args.config, config.deepspeed)
    on_gpus = environment.get("DS_ACCELERATOR", os.environ.get("DS_ACCELERATOR")) != "cpu"
    check_nodes(nodes, Expected(slots, files, address, args.master_port, on_gpus, environment))
    filters = (("include", args.include), ("exclude", args.exclude))
    numbers = (("num_nodes", args.num_nodes), ("num_gpus", args.num_gpus))
    options = ["--hostfile", str(args.hostfile), *rest]
    options += [f"--{name}={value}" for name, value in filters if value]
    options += [f"--{name}={value}" for name, value in numbers if value >= 0]
    arguments = ["--config", str(args.config), *(word for override in args.set for word in ("--set", override))]
    return Plan(launcher, slots, address, args.master_port, nodes, environment, options, arguments)


def is_loopback(host: str) -> bool:
    """Whether a host names the machine that says it, whichever that is."""
    return host in ("localhost", "::1") or host.startswith("127.")


@contextmanager
def commands(job: Plan, name: str) -> Iterator[tuple[list[list[str]], dict[str, str]]]:
    """What to run here to start the job under a name, and in which environment."""
    values = {**job.environment, JOB: name}
    if job.launcher == "ssh":
        yield [_over_ssh(job, values, rank) for rank in range(len(job.slots))], dict(os.environ)
        return
    with tempfile.TemporaryDirectory(prefix="ds_dgemma-") as folder:  # readable by its owner only
        file = Path(folder) / "deepspeed_env"
        write_for_deepspeed(file, values)
        append = shlex.join(job.nodes.ssh[1:])
        own = {"DS_ENV_FILE": str(file), "PDSH_SSH_ARGS_APPEND": append}
        yield [_over_pdsh(job)], without_exports(os.environ) | own


def _over_pdsh(job: Plan) -> list[str]:
    quiet = [] if {"--log_level", "-q", "--quiet"} & set(job.options) else ["--log_level", "warning"]
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner", *job.options, *quiet, "--force_multi", "--no_ssh_check"),
        *("--launcher", "pdsh", "--master_addr", job.address, "--master_port", str(job.port)),
        *("--module", TRAIN, *map(for_pdsh, job.arguments)),
    ]


def _over_ssh(job: Plan, values: dict[str, str], rank: int) -> list[str]:
    """DeepSpeed's per-node launcher on one node: what its pdsh runner starts there, with the same arguments."""
    encoded = urlsafe_b64encode(json.dumps(job.slots).encode()).decode()
    command = [
        *(job.nodes.python, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={encoded}"),
        *(f"--node_rank={rank}", f"--master_addr={job.address}", f"--master_port={job.port}"),
        *("--log_level=warning", "--module", TRAIN, *job.arguments),
    ]
    line = f"cd {shlex.quote(job.nodes.directory)} && {exports(values)}exec {shlex.join(command)}"
    return job.nodes.command(list(job.slots)[rank], line)


def run(job: Plan, signals: Signals) -> int:
    """Start a job that passed its checks, and wait for its end."""
    name = new_job()
    print(f"{sum(map(len, job.slots.values()))} ranks on {len(job.slots)} nodes over {job.launcher}", flush=True)
    with commands(job, name) as (lines, environment):
        return run_job(lines, environment, signals, job.nodes, name)


def main(argv: list[str] | None = None) -> int:
    """Check, train; 2 for a user's mistake, 69 where a node is only away, otherwise what the launcher says."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        return run(plan(arguments), Signals())
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return EXIT_UNREACHABLE if isinstance(error, Unreachable) else EXIT_USER_ERROR
    except KeyboardInterrupt:  # nothing is started yet
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
