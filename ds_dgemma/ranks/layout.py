"""Ranks: who this process is, who shares experts with whom, and how all of them agree.

Experts are split over `expert_parallel_size` neighbouring ranks; everything else is data parallel. With 8 ranks and
EP 4:

    expert group   0 1 2 3 | 4 5 6 7     each rank of a group holds a quarter of every layer's experts
    replicas       0 4, 1 5, 2 6, 3 7    hold the same experts; ZeRO partitions them over these

Source: DeepSpeed `utils/groups.py` (`_create_expert_and_data_parallel`, its default order).
"""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ds_dgemma.errors import EXIT_USER_ERROR, UserError


@dataclass(frozen=True)
class RankLayout:
    """This process among all, as arithmetic; no process group is needed to make one."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    expert_parallel_size: int

    @classmethod
    def from_environment(cls, expert_parallel_size: int) -> "RankLayout":
        """Read what the launcher set; a process without one is rank 0 of 1."""

        def get(name: str, default: int) -> int:
            return int(os.environ.get(name, default))

        world = get("WORLD_SIZE", 1)
        local_world = get("LOCAL_WORLD_SIZE", get("LOCAL_SIZE", world))  # torchrun's name, DeepSpeed's name
        return cls(get("RANK", 0), world, get("LOCAL_RANK", 0), local_world, expert_parallel_size)

    @property
    def expert_rank(self) -> int:
        """Which part of every layer's experts this rank holds."""
        return self.rank % self.expert_parallel_size

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that writes, prints and tracks."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """This rank's accelerator, or the CPU, which DS_ACCELERATOR=cpu asks for where there is a GPU too."""
        wants_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
        return torch.device("cpu") if wants_cpu else torch.device("cuda", self.local_rank)


def disconnect() -> None:
    """Leave together: a fast rank's exit would abort the others' last collective."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Add numbers over all ranks, in float64."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gather(value: Any, ranks: RankLayout, group: Any = None) -> list[Any]:
    """What every rank gave, in their order."""
    values: list[Any] = [None] * ranks.world
    dist.all_gather_object(values, value, group=group)
    return values


@contextmanager
def agreed(ranks: RankLayout, hours: float | None = None) -> Iterator[None]:
    """Run a block that may find a user's mistake; when any rank found one, rank 0 tells it once and all ranks exit.

    The block may hold a collective only where no rank can fail alone before it: the others would wait in it. With
    `hours` a rank may take that long instead of the process group's timeout.
    """
    group: Any = dist.new_group(backend="gloo", timeout=timedelta(hours=hours)) if hours else None
    found: str | None = None
    try:
        yield
    except UserError as error:
        found = str(error)
    messages = gather(found, ranks, group)
    if group is not None:
        dist.destroy_process_group(group)
    problems = {text: rank for rank, text in reversed(list(enumerate(messages))) if text is not None}
    if not problems:
        return
    if ranks.is_main:
        for text, rank in problems.items():
            where = f"rank {rank}: " if rank else ""
            print(f"{where}{text}", file=sys.stderr, flush=True)
    disconnect()
    raise SystemExit(EXIT_USER_ERROR)
