"""A function mapped over items by worker processes, results in order.

The workers are torch's, started from a `forkserver`: a fork of a rank would copy the locks of its CUDA, NCCL
and wandb threads as they happen to be held, and can hang; the server is a fresh process that has imported
what workers need, so that each starts at the price of a fork. They use one thread each. They end with their
rank, on SIGKILL too: a thread waits for that. torch's own watch does not see it, for a worker's parent is the
server, and the server stays while it has workers.

A signal that asks a run to stop reaches them too: the terminal and DeepSpeed's launcher send it to everything below.
Their rank needs them to the end of its step, so server, workers and multiprocessing's resource tracker have these
signals blocked (they inherit it), and a worker ends by the one that its own rank sends.
"""

import gc
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ds_dgemma.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

PREFETCH = 4  # results a worker prepares ahead
STOPS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}  # what asks a run to stop: ranks/stop_request.py


class _Mapped(Dataset):
    """A function as a dataset of its arguments. A `UserError` is returned: torch rewrites raised ones."""

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.function(index)
        except UserError as error:
            return error


def start_server() -> None:
    """Start the server that workers are forked from; it imports in the background, so call it early."""
    needed = [name for name in sys.modules if name.startswith("ds_dgemma.data.")]
    multiprocessing.set_forkserver_preload([*needed, "ds_dgemma.objective.collate"])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        multiprocessing.resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # again: the tracker's start unblocks some
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Hide the program from processes that start: they would import it, DeepSpeed and all, and use none of it."""
    main = sys.modules["__main__"]
    hidden = {name: vars(main).pop(name, None) for name in ("__spec__", "__file__")}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update({name: value for name, value in hidden.items() if value is not None or name == "__spec__"})


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yield `function(item)` for each item, made ahead by `workers` processes; 0: made here, when asked for.

    `function` and its results travel between processes: no closures. `items` may be endless.
    """
    if workers == 0:
        yield from map(function, items)
        return
    start_server()
    loader = DataLoader(
        _Mapped(function),
        sampler=items,
        batch_size=None,  # an item is a whole batch already
        collate_fn=_unchanged,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        multiprocessing_context="forkserver",
        worker_init_fn=_prepare_worker,
        generator=torch.Generator(),  # else torch advances the global one, unlike in a run never stopped
    )
    with _without_main_module():
        results = iter(loader)
    for result in results:
        if isinstance(result, UserError):
            raise result
        yield result


def _unchanged(value: Any) -> Any:
    return value


def _prepare_worker(worker: int) -> None:
    """Keep tokenizers to one thread, as torch does for itself, and watch the rank."""
    gc.freeze()  # or each collection would walk through torch
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for watch in (_end_with_rank, _end_when_rank_asks):
        threading.Thread(target=watch, daemon=True).start()


def _end_with_rank() -> None:
    rank = multiprocessing.parent_process()
    assert rank is not None  # this is a worker
    rank.join()
    os._exit(1)


def _end_when_rank_asks() -> None:
    rank = multiprocessing.parent_process()
    assert rank is not None
    while signal.sigwaitinfo(STOPS).si_pid != rank.pid:
        pass
    os._exit(0)
