"""End this rank when its launcher is gone.

DeepSpeed's launcher can die and leave its ranks behind: SIGKILL to `deepspeed` or to its per-node child orphans
them, and they would go on training beside the run that replaces them. So every rank looks, once a second, whether
those processes are still its ancestors. While it trains it has some seconds for a checkpoint; where a signal asked
for one (SIGUSR1 to all ends launchers too, which do not know it), as long as that takes, within reason.
"""

import os
import threading
import time

import psutil

from ds_dgemma.errors import EXIT_ORPHANED
from ds_dgemma.ranks.stop_request import StopRequest

PER_NODE = "deepspeed.launcher.launch"
LAUNCHERS = (PER_NODE, "deepspeed.launcher.runner", "bin/deepspeed")


def watch_launcher(stop: StopRequest) -> None:
    """Start watching, when a DeepSpeed launcher started this process; otherwise do nothing.

    `deepspeed` may be gone already, killed while this process was importing: then its per-node child hangs below
    the system's first process, or the user's.
    """
    launchers: list[psutil.Process] = []
    for ancestor in psutil.Process().parents():
        command = " ".join(_command(ancestor))
        if not any(name in command for name in LAUNCHERS):
            break
        launchers.append(ancestor)
    if launchers and PER_NODE in " ".join(_command(launchers[-1])) and _is_orphan(launchers[-1]):
        os._exit(EXIT_ORPHANED)
    if launchers:
        threading.Thread(target=_watch, args=(launchers, stop), daemon=True, name="launcher-watch").start()


def _watch(launchers: list[psutil.Process], stop: StopRequest) -> None:
    while all(launcher.is_running() and launcher.status() != psutil.STATUS_ZOMBIE for launcher in launchers):
        time.sleep(1)
    time.sleep(stop.launcher_is_gone())
    # No clean-up: the other ranks do the same, and a collective would wait for them.
    stop.leave(EXIT_ORPHANED, "ended: its launcher is gone")


def _is_orphan(process: psutil.Process) -> bool:
    parent = process.parent()
    return parent is None or parent.pid == 1 or parent.name() == "systemd"


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
