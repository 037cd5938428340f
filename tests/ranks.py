"""Run a function on several ranks that are forks of the test's process: real process groups without a launcher."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

SECONDS = 240


def on_ranks(world: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `work(rank, *arguments)` on every rank and return what each returned or raised; `folder` is for meeting."""
    fork = multiprocessing.get_context("fork")
    store = folder / f"store-{len(list(folder.glob('store-*')))}"
    results = fork.SimpleQueue()
    ranks = [fork.Process(target=_rank, args=(rank, world, store, results, work, arguments)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(SECONDS)
    hanging = [process.pid for process in ranks if process.is_alive()]
    for process in ranks:
        process.kill()
    assert not hanging, f"hanging after {SECONDS} s"
    assert not any(process.exitcode for process in ranks), [process.exitcode for process in ranks]
    return [value for _, value in sorted((results.get() for _ in ranks), key=lambda result: result[0])]


def _rank(rank: int, world: int, store: Path, results: Any, work: Callable[..., Any], arguments: tuple) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(store), world), rank=rank, world_size=world)
    try:
        result = work(rank, *arguments)
    except Exception as error:
        result = error
    results.put((rank, result))
    dist.barrier()
    dist.destroy_process_group()
