"""`optimizer`: which one, its learning rates and their schedule, and parameters that differ."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from ds_dgemma.config.section import Section


def checked_pattern(pattern: str) -> str:
    """A pattern of names as it is: a glob, or a regular expression after `re:`, which must be one."""
    if pattern.startswith("re:"):
        check_expression(pattern.removeprefix("re:"))
    return pattern


def check_expression(expression: str, setting: str = "") -> None:
    """Raise `ValueError` for what is no regular expression."""
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(f"{setting}{expression!r} is no regular expression: {error}") from None


Pattern = Annotated[str, AfterValidator(checked_pattern)]


class ParameterGroupSection(Section):
    """Parameters with a learning rate or weight decay of their own."""

    match: Pattern = Field(
        description="pattern of checkpoint parameter names, or with lora of adapter names: `*.experts.*`, `*lora_B*`; "
        "a regular expression after `re:`"
    )
    lr: float | None = Field(
        default=None,
        gt=0,
        strict=True,
        description="peak learning rate; follows the schedule in proportion. null: optimizer.lr, or muon_lr",
    )
    weight_decay: float | None = Field(
        default=None, ge=0, strict=True, description="decoupled weight decay; null: optimizer.weight_decay"
    )

    @model_validator(mode="after")
    def _different(self) -> "ParameterGroupSection":
        if self.lr is None and self.weight_decay is None:
            raise ValueError("a group needs an lr or a weight_decay of its own")
        return self


class OptimizerSection(Section):
    """The optimizer and its schedule: linear warm-up, then a cosine to `min_lr`."""

    type: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="muon: Muon for matrices (attention, MLPs, experts), AdamW for the rest (embedding, norms, scales, "
        "routers); it needs ZeRO stage 3 and train.gradient_clipping 0",
    )
    lr: float = Field(default=1.5e-4, gt=0, description="peak learning rate of AdamW")
    min_lr: float = Field(default=1.5e-5, ge=0, description="learning rate at the last step")
    muon_lr: float = Field(
        default=0.02, gt=0, description="peak learning rate of Muon's matrices; follows the schedule in proportion"
    )
    muon_momentum: float = Field(default=0.95, ge=0, lt=1, description="Muon's decay rate")
    warmup_steps: int = Field(default=25, ge=0, description="steps of linear warm-up")
    betas: tuple[float, float] = Field(default=(0.95, 0.99), description="Adam's decay rates")
    eps: float = Field(default=1e-8, gt=0, description="Adam's denominator offset")
    weight_decay: float = Field(default=1e-4, ge=0, description="decoupled weight decay")
    groups: tuple[ParameterGroupSection, ...] = Field(
        default=(), description="parameters that differ; the first match wins"
    )

    @model_validator(mode="after")
    def _ordered(self) -> "OptimizerSection":
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")
        return self
