"""Join the process group through DeepSpeed."""

import logging
import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from ds_dgemma.errors import UserError, first_line
from ds_dgemma.ranks.layout import RankLayout, free_port

NCCL_MARGIN_SECONDS = 30


def connect(ranks: RankLayout, timeout_minutes: float) -> None:
    """Join the process group through DeepSpeed; a process started without a launcher is a group of one.

    Raises:
        UserError: the ranks do not find each other.
    """
    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.local_world))
    if "MASTER_ADDR" not in os.environ:
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0"
        )
    import deepspeed  # its accelerator is chosen at import

    from ds_dgemma.engine import private

    private.without_shared_memory()
    quiet_libraries()
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    # NCCL's watchdog aborts the process without a word: rank 0 names the cause before it does.
    backend, margin = ("nccl", NCCL_MARGIN_SECONDS) if ranks.device.type == "cuda" else ("gloo", 0)
    timeout = timedelta(minutes=timeout_minutes, seconds=margin)
    try:
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:
        where = f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ['MASTER_PORT']}"
        raise UserError(
            f"the ranks cannot meet ({where}): {first_line(error)}. Another run may use the port: choose one with "
            "--master_port. Or rank 0's machine cannot be reached."
        ) from error


def quiet_libraries() -> None:
    """Silence what DeepSpeed and torch say on every step or rank about each other's internals."""
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    logger.addFilter(lambda log: "OVERFLOW!" not in log.getMessage())  # a skipped step has a line of our own
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
