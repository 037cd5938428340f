"""A training job under the `deepspeed` launcher, to be broken: every process of it can be found and counted."""

import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from ds_dgemma.ranks.layout import free_port
from tests.training import REPOSITORY

MARK = "DS_DGEMMA_FAULT_TRIAL"


@dataclass
class Job:
    """One start of the training command, all its processes known by a mark in their environment."""

    config: Path
    run_dir: Path
    overrides: list[str]
    ranks_wanted: int
    log: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(self.ranks_wanted)]
        program = ["--master_port", str(free_port()), "--module", "ds_dgemma.train", "--config", str(self.config)]
        overrides = [part for setting in [f"run.dir={self.run_dir}", *self.overrides] for part in ("--set", setting)]
        self.before = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as output:
            self.launcher = subprocess.Popen(
                [*launcher, *program, *overrides],
                env={**os.environ, MARK: self.mark},
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
                start_new_session=True,
            )

    def processes(self) -> list[psutil.Process]:
        """All that are alive."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def ranks(self) -> list[psutil.Process]:
        """The training processes."""
        return [process for process in self.processes() if "-m ds_dgemma.train --local_rank" in command_of(process)]

    def launchers(self) -> list[psutil.Process]:
        """`deepspeed` and its child."""
        return [process for process in self.processes() if "-m deepspeed.launcher." in command_of(process)]

    def step(self) -> int:
        """Steps that are on record."""
        metrics = self.run_dir / "metrics.jsonl"
        return sum('"kind"' not in line for line in metrics.read_text().splitlines()) if metrics.exists() else 0

    def output(self) -> str:
        """What this start has printed."""
        return self.log.read_bytes()[self.before :].decode(errors="replace")

    def end(self, seconds: float) -> int | None:
        """Wait until no process is left; the launcher's exit code, or None when some had to be killed."""
        deadline = time.monotonic() + seconds
        while self.launcher.poll() is None or self.processes():
            if time.monotonic() > deadline:
                for process in self.processes():
                    send(process, signal.SIGKILL)
                self.launcher.wait()
                return None
            time.sleep(0.05)
        return self.launcher.returncode


def command_of(process: psutil.Process) -> str:
    """Its command line; empty when it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def send(process: psutil.Process, number: int) -> None:
    """Signal a process, which may be gone."""
    with suppress(psutil.Error):
        process.send_signal(number)
