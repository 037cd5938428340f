"""`tracking`: where a run's figures go besides `metrics.jsonl`."""

from typing import Literal

from pydantic import Field

from ds_dgemma.config.section import Section


class WandbSection(Section):
    """Weights & Biases; the run id is kept in the run directory, so a resumed run continues its curve."""

    mode: Literal["online", "offline", "disabled"] = Field(default="disabled", description="where wandb logs")
    project: str = Field(default="ds_dgemma", description="project")
    entity: str | None = Field(default=None, description="team or user; wandb's default when absent")
    name: str | None = Field(default=None, description="run name; the run directory's name when absent")
    tags: tuple[str, ...] = Field(default=(), description="tags")


class TrackioSection(Section):
    """trackio: a dashboard on this machine (`trackio show`), or in a Space of the hub."""

    project: str = Field(default="ds_dgemma", description="project")
    name: str | None = Field(default=None, description="run name; the run directory's name when absent")
    space_id: str | None = Field(default=None, description="Space of the hub, as user/name; null: this machine")


class TrackingSection(Section):
    """What is written while training; `metrics.jsonl` always has every step."""

    console_every: int = Field(default=10, ge=1, description="steps between plain lines when not on a terminal")
    peak_tflops: float | None = Field(
        default=None,
        gt=0,
        description="of one device in dense bf16 products, what `mfu` is a share of; null: by the name of the CUDA "
        "card, and where that is unknown, or on the CPU, `mfu` is null",
    )
    wandb: WandbSection = WandbSection()
    tensorboard: bool = Field(default=False, description="write event files below the run directory, in tensorboard/")
    trackio: TrackioSection | None = Field(default=None, description="log to trackio; null: not")
