"""`validation` and `evaluation`: how good a model is while it trains."""

from typing import Annotated

from pydantic import Field, model_validator

from ds_dgemma.config.section import Section


class ValidationSection(Section):
    """Loss on held-out data, with noise that is the same in every run and at every step."""

    every: int = Field(
        default=0,
        ge=0,
        description="steps between validations, of which one is before the first and one after the last step; 0: none",
    )
    examples: int = Field(default=256, ge=1, le=10**9, description="examples of data.validation that are used")
    noise_levels: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        default=(0.1, 0.3, 0.5, 0.7, 0.9),
        min_length=1,
        description="each canvas is denoised at all of these; the diffusion loss is their mean",
    )


class SamplerSection(Section):
    """Settings of the sampler; null: the checkpoint's generation_config.json's."""

    max_new_tokens: int | None = Field(default=None, ge=1, description="tokens of an answer, rounded up to canvases")
    max_denoising_steps: int | None = Field(default=None, ge=1, description="decoder passes a canvas, at most")
    entropy_bound: float | None = Field(
        default=None, gt=0, description="summed entropy of the tokens that are accepted in a step"
    )
    t_min: float | None = Field(default=None, ge=0, description="temperature of the last step")
    t_max: float | None = Field(default=None, gt=0, description="temperature before the first")
    stability_threshold: int | None = Field(
        default=None, ge=0, description="steps without a change before a canvas may be done"
    )
    confidence_threshold: float | None = Field(default=None, gt=0, description="mean entropy below which it is")


class EvaluationSection(Section):
    """Answers to held-out conversations, scored by a task, from the engine as it trains."""

    every: int = Field(default=0, ge=0, description="steps between evaluations, and one after the last step; 0: none")
    task: str | None = Field(default=None, description="as `ds-dgemma evaluate --task`")
    examples: int = Field(default=64, ge=1, le=10**6, description="first conversations of data.validation")
    batch_size: int = Field(default=16, ge=1, description="prompts that a rank answers at once")
    sampler: SamplerSection = SamplerSection()

    @model_validator(mode="after")
    def _possible(self) -> "EvaluationSection":
        if self.every and self.task is None:
            raise ValueError("task is required where evaluation.every is set: what makes an answer right")
        return self
