"""Several nodes: a hostfile that cannot work is refused before anything starts, and two nodes train as one machine."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from base64 import urlsafe_b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from deepspeed.launcher.runner import EXPORT_ENVS, _parse_hostfile, parse_args

from ds_dgemma.errors import EXIT_STOPPED, EXIT_UNREACHABLE, EXIT_USER_ERROR, UserError
from ds_dgemma.launch.hostfile import rank_environment, read_hostfile, select_hosts
from ds_dgemma.launch.job import Nodes
from ds_dgemma.launch.multinode import check_nodes, commands, plan
from tests.nodes import HOSTS, ssh_config, steady_port  # noqa: F401 (a fixture)
from tests.training import REPOSITORY, read_metrics, train

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No file of the user's: neither ~/.deepspeed_env nor ssh's."""
    monkeypatch.setenv("DS_ENV_FILE", str(tmp_path / "deepspeed_env"))
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-F /dev/null")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "hosts cannot be read: .*No such file or directory. It has lines `node1 slots=8`"),
        (b"", "hosts: no host in it"),
        (b"\n# node1 slots=8\n", "hosts: no host in it"),
        (b"node1 slots=8\n\xff\xfe slots=8\n", "hosts cannot be read: .*in position 14"),
        (b"node1\n", "hosts:1: 'node1' is not `node1 slots=8`"),
        (b"node1 8\n", "hosts:1: 'node1 8' is not"),
        (b"node1 slots=8 max_slots=8\n", "hosts:1: .* is not"),
        (b"node1 slots=8\nnode2 slots=\n", "hosts:2: .* is not"),
        (b"node1 slots=-1\n", "hosts:1: .* is not"),
        (b"node1 slots=8GPUs\n", "hosts:1: .* is not"),
        (b"node1 slots=" + b"9" * 5000 + b"\n", "hosts:1: .* is not"),
        (b"node1 slots=0\n", "hosts:1: .* is not"),
        (b"node1 slots=1\nnode1 slots=1\n", "hosts:2: .*a host that an earlier line has: node1"),
        (b"node1 slots=1\nNODE1 slots=1\n", "hosts:2: .*a host that an earlier line has: NODE1"),
        (b"me@node1 slots=1\n", "hosts:1: 'me@node1 slots=1' is not"),
        (b"-oProxyCommand=reboot slots=1\n", "hosts:1: .* is not"),
        (b"node1\0 slots=1\n", "hosts:1: .* is not"),
        (b"node1 slots=0\nnode2\n", "2 problems in the hostfile"),
        (b"node1 slots=3\n", r"train.global_batch_size = 8 +is not a multiple of"),
        (b"node1 slots=1\nnode2 slots=1\n", "node1 has 1, node2 has 1. Set it to 1, or let groups reach across"),
    ],
)
def test_a_hostfile_that_cannot_work_is_refused(content, said: str, sudoku_run: Path, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    if content is not None:
        hosts.write_bytes(content)
    overrides = ["--set", "train.micro_batch_size=1", "--set", "parallel.expert_parallel_size=2"]
    with pytest.raises(UserError, match=said) as refused:
        plan(["--hostfile", str(hosts), "--config", str(sudoku_run), *overrides])
    assert all(len(line) < 300 + len(str(hosts)) for line in str(refused.value).splitlines())


def test_a_good_hostfile_means_what_deepspeed_reads(tmp_path: Path) -> None:
    text = "# ours\n\nnode1 slots=8\n  node-2.cluster   slots=4 # half of it\n10.0.0.3\tslots=16\n"
    (tmp_path / "hosts").write_text(text)
    hosts = read_hostfile(tmp_path / "hosts")
    assert hosts == _parse_hostfile(text.splitlines())
    assert list(hosts) == ["node1", "node-2.cluster", "10.0.0.3"]
    assert select_hosts(hosts, include="10.0.0.3:0,2@node1") == {"node1": [*range(8)], "10.0.0.3": [0, 2]}
    assert select_hosts(hosts, exclude="node1@10.0.0.3:0") == {
        "node-2.cluster": [*range(4)],
        "10.0.0.3": [*range(1, 16)],
    }
    assert select_hosts(hosts, num_nodes=2, num_gpus=2) == {"node1": [0, 1], "node-2.cluster": [0, 1]}
    assert select_hosts(hosts) == {host: [*range(slots)] for host, slots in hosts.items()}
    for wrong in ({"include": "node9"}, {"num_gpus": 5}, {"num_nodes": 4}, {"include": "node1", "num_gpus": 1}):
        with pytest.raises(UserError, match="--"):
            select_hosts(hosts, **wrong)
    for text in ("node1:a", "node1:", "node1:0-3", "node1:0:1", f"node1:{'9' * 5000}"):
        with pytest.raises(UserError, match="is NODE, all slots of a host, or NODE:0,2"):
            select_hosts(hosts, include=text)


def lines_of(launcher: str, slots: dict[str, list[int]], arguments: list[str] = [], **environment: str) -> list[str]:  # noqa: B006
    """What each node's shell is given, or the one line that pdsh gives all of them."""
    options = parse_args(["--master_addr=node1", "--module", "ds_dgemma.train", *arguments])
    return [line[-1] for line in commands(launcher, Nodes(slots, environment=environment), options)]


def test_ssh_starts_the_slots_that_were_chosen() -> None:
    """By the description of the job that DeepSpeed's per-node launcher reads its GPUs from."""
    chosen = select_hosts({"node1": 8, "node2": 8}, include="node1:4,5@node2:6")
    lines = lines_of("ssh", chosen)
    encoded = [re.findall(r"--world_info=(\S+)", line)[0] for line in lines]
    assert [json.loads(urlsafe_b64decode(text)) for text in encoded] == 2 * [{"node1": [4, 5], "node2": [6]}]
    assert [re.findall(r"--node_rank=(\S+)", line) for line in lines] == [["0"], ["1"]]


@pytest.mark.parametrize("launcher", ["pdsh", "ssh"])
def test_what_a_node_is_given_arrives_as_it_was(launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through DeepSpeed's own quoting and a real shell: settings with blanks, quotes, globs; the node's variables."""
    settings = [
        'a=[{match: "*.experts.*", lr: 1e-4}]',
        "*",
        "a b",
        "$HOME",
        "x $HOME `id` \\ \" '",
        "it's",
        "100%n",
    ]
    monkeypatch.setenv("SECRET_FILE", str(tmp_path / "secret"))
    monkeypatch.setattr(sys, "executable", "/of_the_job/show")  # the function below
    (tmp_path / "secret").write_text("s3cret")
    (tmp_path / "deepspeed_env").write_text('# ours\n\nPLAIN=1%n\nQUOTED="a b"\nWANDB_API_KEY=$(cat $SECRET_FILE)\n')
    arguments = [word for setting in settings for word in ("--set", setting)]
    (sent,) = lines_of(launcher, {"node1": [0]}, arguments, **rank_environment())
    if launcher == "pdsh":
        assert sent.count("--node_rank=%n") == 1
        sent = re.sub("%(.)", lambda found: {"%": "%", "n": "0"}[found[1]], sent)  # as pdsh does
    assert "--node_rank=0" in sent
    assert "s3cret" not in sent
    shown = '/of_the_job/show() { printf "%s\\n" "$PLAIN" "$QUOTED" "$WANDB_API_KEY" "${@:10}"; }; ' + sent
    done = subprocess.run(["bash", "-c", shown], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["1%n", "a b", "s3cret", "ds_dgemma.train", *arguments]


@pytest.mark.parametrize("launcher", ["pdsh", "ssh"])
def test_nothing_of_the_shell_is_exported_unasked(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's runner exports what begins so; a command line with a secret in it is everybody's to read."""
    for beginning in EXPORT_ENVS:
        monkeypatch.setenv(f"{beginning}_TRACKING_TOKEN", "s3cret")
    (sent,) = lines_of(launcher, {"node1": [0]}, UCX_TLS="rc")
    assert "s3cret" not in sent
    assert 'export UCX_TLS="rc";' in sent  # the file's own are


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("export A=1", "deepspeed_env:1: is not NAME=VALUE, without `export`"),
        ("A", "is not NAME=VALUE"),
        ("HF_TOKEN=hf_abc", r"HF_TOKEN is written out.*HF_TOKEN=\$\(cat FILE\)"),
        ('HF_TOKEN="hf_abc"', "HF_TOKEN is written out"),
        ("DB_PASSWD=hf_abc", "DB_PASSWD is written out"),
        ("GITHUB_PAT=hf_abc", "GITHUB_PAT is written out"),
        ("AUTH=hf_abc", "AUTH is written out"),
        ("WANDB_API_KEYS=hf_abc", "WANDB_API_KEYS is written out"),
        ("HTTPS_PROXY=http://me:hf_abc@proxy:3128", "HTTPS_PROXY is written out"),
    ],
)
def test_an_environment_file_that_cannot_work_is_refused(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "deepspeed_env").write_text(line + "\n")
    with pytest.raises(UserError, match=said) as refused:
        rank_environment()
    assert "hf_abc" not in str(refused.value)


@pytest.mark.parametrize(
    "line",
    [
        'WANDB_API_KEY="$(cat $HOME/key)"',
        "HTTPS_PROXY=http://me:$(cat key)@proxy:3128",
        "NO_PROXY=http://proxy:3128",
        "TOKENIZERS_PARALLELISM=false",
        "SSH_AUTH_SOCK=/run/agent",
        "LD_LIBRARY_PATH=/opt/lib",
        "HF_TOKEN=",
    ],
)
def test_what_is_no_secret_written_out_is_taken(line: str, tmp_path: Path) -> None:
    (tmp_path / "deepspeed_env").write_text(line + "\n")
    name, _, value = line.partition("=")
    assert rank_environment()[name] == value.strip('"')


def test_hosts_that_ssh_does_not_reach_are_all_told_before_anything_starts(sudoku_run: Path, tmp_path: Path) -> None:
    done = over_closed_port("no-such-host.invalid slots=1\n127.0.0.1 slots=1\n", sudoku_run, tmp_path)
    assert done.returncode == EXIT_USER_ERROR, done.stderr
    head, unknown, unreachable, advice = done.stderr.splitlines()[-4:]
    assert head == "2 problems in the nodes"
    assert re.match("no-such-host.invalid: ssh does not reach it: .*resolve hostname", unknown.strip())
    assert re.match("127.0.0.1: ssh does not reach it: .*Connection refused.*without a password", unreachable.strip())
    assert "Nothing was started" in advice


def test_a_node_that_is_away_is_waited_for_from_the_first_try(sudoku_run: Path, tmp_path: Path) -> None:
    keep_going = [REPOSITORY / "launch/keep_going.sh", "--wait", "0.01", "--tries", "2"]
    done = over_closed_port("127.0.0.1 slots=1\n", sudoku_run, tmp_path, *keep_going)
    assert done.returncode == EXIT_UNREACHABLE, done.stderr
    assert (
        "keep_going: try 1 ended with exit code 69 and is not complete; newest checkpoint: step 0. Again" in done.stderr
    )
    assert "Given up: 2 tries" in done.stderr
    (tmp_path / "deepspeed_env").write_text("A mistake\n")
    done = over_closed_port("127.0.0.1 slots=1\n", sudoku_run, tmp_path, *keep_going)
    assert done.returncode == EXIT_USER_ERROR, done.stderr
    assert "Again" not in done.stderr


def over_closed_port(hosts: str, config: Path, tmp_path: Path, *before: str | Path) -> subprocess.CompletedProcess:
    """What becomes of a job on hosts where nothing answers."""
    if not shutil.which("ssh"):
        pytest.skip("ssh is not installed (apt-get install openssh-client)")
    (tmp_path / "hosts").write_text(hosts)
    command = [*before, REPOSITORY / "launch/multinode.sh", "--hostfile", "hosts", "--launcher", "ssh"]
    command += ["--ssh_port", str(steady_port()), "--config", config, "--set", "train.micro_batch_size=4"]
    return subprocess.run(
        ["bash", *command, "--set", f"run.dir={tmp_path / 'run'}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_a_node_that_is_not_like_the_others_is_told(ssh_config: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "same").write_text("same")
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {os.path.realpath(sys.executable)} -I -S "$@"\n')  # without any package
    bare.chmod(0o755)

    def told(hosts=HOSTS, file=tmp_path / "same", address=HOSTS[0], port: int | None = None, **own: Any) -> str:
        ssh = ("ssh", "-oBatchMode=yes", "-F", str(ssh_config))
        nodes = Nodes({host: [0] for host in hosts}, ssh, **{"directory": str(REPOSITORY), **own})
        try:
            check_nodes(nodes, [file], address, port or steady_port(), on_gpus=False)
        except UserError as error:
            return str(error)
        return ""

    assert told() == ""
    assert f"127.0.0.2: {sys.executable} in {tmp_path / 'none'} does not run" in told(directory=str(tmp_path / "none"))
    assert f"127.0.0.1: {tmp_path}/python3 in {REPOSITORY} does not run" in told(python=f"{tmp_path}/python3")
    assert "127.0.0.1: code ds_dgemma: ModuleNotFoundError: No module named 'ds_dgemma'" in told(
        directory=str(tmp_path), python=str(bare)
    )
    assert "127.0.0.2: address no.invalid: gaierror" in told(address="no.invalid")
    assert "localhost: is the same machine as 127.0.0.1" in told(hosts=(*HOSTS, "localhost"))
    (tmp_path / "other/ds_dgemma").mkdir(parents=True)
    (tmp_path / "other/ds_dgemma/__init__.py").touch()
    other = {"PYTHONPATH": str(tmp_path / "other")}
    assert re.search(r"127.0.0.2: code ds_dgemma: \w+, not \w+\n", told(directory=str(tmp_path), environment=other))
    assert told(directory=str(tmp_path), environment={"PYTHONPATH": str(REPOSITORY)}) == ""
    with socket.create_server(("", 0)) as taken:
        said = told(port=taken.getsockname()[1])
        assert re.search(r"127.0.0.1: port \d+: OSError: .*in use", said)
        assert "127.0.0.2" not in said  # rank 0 is on the first
    with pytest.MonkeyPatch.context() as patch:
        (tmp_path / "relative").write_text("here")
        patch.chdir(tmp_path)
        assert "127.0.0.2: file relative: FileNotFoundError" in told(file=Path("relative"))


@pytest.mark.slow
def test_nodes_that_do_not_share_the_run_directory_are_told(sudoku_run: Path, tmp_path: Path) -> None:
    """A first start on two disks, where neither has anything yet that the other lacks."""
    addresses = {"MASTER_ADDR": HOSTS[0], "MASTER_PORT": str(steady_port()), "WORLD_SIZE": "2", "LOCAL_SIZE": "1"}
    settings = ["--config", str(sudoku_run), "--set", "run.dir=run", "--set", "train.micro_batch_size=4"]
    ranks = []
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        environment = {**os.environ, **addresses, "RANK": rank, "LOCAL_RANK": "0", "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-m", "ds_dgemma.train", *settings]
        ranks.append(subprocess.Popen(command, cwd=tmp_path / rank, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        said = [rank.communicate(timeout=600)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert "run.dir: run is not the same directory for all ranks" in said[0]
    assert not list(tmp_path.rglob("metrics.jsonl"))


def children_of_node(number: int, log: Path) -> list[psutil.Process]:
    """A rank on a node of the job, and all that is above it there: the launcher, its shell, the ssh session."""
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if environment.get("CROSS_RANK") == str(number) and environment.get("TEST_RUN") == str(log):
                above = process.parents()
                last = next(i for i, parent in enumerate(above) if "sshd" in parent.name())
                return [process, *above[: last + 1]]
        except (psutil.Error, StopIteration):
            continue
    return []


NODES = ["train.micro_batch_size=4", "parallel.expert_groups_across_nodes=true"]


def start_on_nodes(
    config: Path, run_dir: Path, ssh: Path, launcher: str, settings: list[str]
) -> tuple[subprocess.Popen, Path]:
    """The loop around two ranks on two nodes, and its log."""
    log = run_dir.with_suffix(".log")
    (run_dir.parent / "deepspeed_env").write_text(f"DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nTEST_RUN={log}\n")
    (run_dir.parent / "hosts").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    hosts = ["--hostfile", str(run_dir.parent / "hosts"), "--launcher", launcher, "--master_port", str(steady_port())]
    overrides = [word for setting in [*NODES, f"run.dir={run_dir}", *settings] for word in ("--set", setting)]
    command = ["bash", "launch/keep_going.sh", "--wait", "0.1", "launch/multinode.sh", *hosts, "--config", str(config)]
    environment = {**os.environ, "PDSH_SSH_ARGS_APPEND": shlex.join(["-F", str(ssh)])}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *overrides], cwd=REPOSITORY, env=environment, stdout=output, stderr=output
        )
    return process, log


def wait_for(happened: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.05)
    return happened()


@pytest.mark.slow
def test_two_nodes_over_a_hostfile_train_as_one_machine(sudoku_run: Path, ssh_config: Path, tmp_path: Path) -> None:  # noqa: F811
    """EP 1 over ssh; EP 2 over pdsh, where a node is lost in the middle and the loop goes on by itself."""
    settings = ["train.max_steps=6", "checkpoint.every=2"]
    ep1, ep2 = ([*settings, f"parallel.expert_parallel_size={size}"] for size in (1, 2))
    alone = train(sudoku_run, tmp_path / "alone", [*NODES, *ep2], processes=2)

    process, log = start_on_nodes(sudoku_run, tmp_path / "ssh", ssh_config, "ssh", ep1)
    try:
        assert process.wait(600) == 0, log.read_text()
        assert compared(read_metrics(tmp_path / "ssh")) == pytest.approx(compared(alone), rel=1e-5)
    finally:
        process.terminate()

    process, log = start_on_nodes(sudoku_run, tmp_path / "pdsh", ssh_config, "pdsh", ep2)
    try:
        wait_for((tmp_path / "pdsh/checkpoints/step-000002").exists, 200)
        victims = children_of_node(1, log)
        assert [victim.kill() for victim in victims], log.read_text()
        wait_for(lambda: "Again in" in log.read_text() or process.poll() is not None, 100)
        assert "Again in 0.1 s" in log.read_text()
        assert process.wait(600) == 0, log.read_text()
        assert re.search(r"try 2, from step [24] of 6", log.read_text())
        assert compared(read_metrics(tmp_path / "pdsh")) == compared(alone)  # bit for bit
        assert not children_of_node(0, log)
        assert not children_of_node(1, log)
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "number"), [("pdsh", signal.SIGUSR1), ("ssh", signal.SIGKILL)])
def test_the_end_of_the_loop_stops_the_nodes_after_a_checkpoint(
    launcher: str,
    number: int,
    sudoku_run: Path,
    ssh_config: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """By a signal, and by SIGKILL, which leaves the guards of the nodes."""
    settings = ["train.max_steps=2000", "optimizer.warmup_steps=4", "parallel.expert_parallel_size=2"]
    process, log = start_on_nodes(sudoku_run, tmp_path / "run", ssh_config, launcher, settings)
    try:
        metrics = tmp_path / "run/metrics.jsonl"
        assert wait_for(lambda: metrics.exists() and bool(read_metrics(tmp_path / "run")), 200), log.read_text()
        process.send_signal(number)
        assert process.wait(200) == (EXIT_STOPPED if number == signal.SIGUSR1 else -number), log.read_text()
        assert wait_for(lambda: not children_of_node(0, log) and not children_of_node(1, log), 60), log.read_text()
        step = read_metrics(tmp_path / "run")[-1]["step"]
        assert (tmp_path / f"run/checkpoints/step-{step:06d}/state.json").exists(), log.read_text()
        assert f"stopped after step {step} by SIGTERM" in log.read_text()
    finally:
        process.kill()


def compared(metrics: list[dict]) -> list[float]:
    return [record[key] for record in metrics for key in ("loss", "loss_diffusion", "loss_ar", "grad_norm")]
