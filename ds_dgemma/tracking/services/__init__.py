"""Services that draw a run's curves. To add one: a class in a file here, its settings in `config/tracking.py`, and its
line below.
"""

from ds_dgemma.config.run import RunConfig
from ds_dgemma.tracking.services.service import Service
from ds_dgemma.tracking.services.tensorboard import TensorBoard
from ds_dgemma.tracking.services.trackio import Trackio
from ds_dgemma.tracking.services.wandb import Wandb


def open_services(config: RunConfig, start: int, told: int) -> list[Service]:
    """The services that `tracking` names, for a run that goes on from step `start` and has told of `told` steps.

    Raises:
        UserError: one does not start, or its package is missing.
    """
    tracking, run_dir = config.tracking, config.run.dir
    settings = config.model_dump(mode="json")
    services: list[Service] = []
    if tracking.wandb.mode != "disabled":
        services.append(Wandb(tracking.wandb, run_dir, settings))
    if tracking.tensorboard:
        services.append(TensorBoard(run_dir, settings, start))
    if tracking.trackio:
        services.append(Trackio(tracking.trackio, run_dir, settings, told))
    return services
