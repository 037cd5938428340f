"""What shapes an answer: what a user sets, the checkpoint's `generation_config.json`, transformers' defaults."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
    EntropyBoundSamplerConfig,
)

from ds_dgemma.errors import UserError, first_line


@dataclass(frozen=True)
class SamplerSettings:
    """Settings by transformers' names."""

    max_new_tokens: int  # whole canvases are made: up to a canvas more
    max_denoising_steps: int
    entropy_bound: float
    t_min: float  # temperature of the last step
    t_max: float  # and before the first
    stability_threshold: int | None  # steps; None: no early stop
    confidence_threshold: float | None  # nats
    stop_ids: frozenset[int]
    pad_id: int | None  # what stands behind a stop

    def named(self) -> dict[str, Any]:
        """For a report."""
        return {**vars(self), "stop_ids": sorted(self.stop_ids)}


def in_words(named: Mapping[str, Any]) -> str:
    """`SamplerSettings.named` on one line."""
    return ", ".join(f"{name} {value}" for name, value in named.items())


def ends_of(settings: SamplerSettings, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """The ids that end an answer's text: the sampler's, and the tokenizer's EOS."""
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)  # load_tokenizer looked
    return settings.stop_ids | {eos}


def read_settings(directory: Path, overrides: Mapping[str, Any]) -> SamplerSettings:
    """The settings of a checkpoint, but for `overrides`, by transformers' names; null there counts as not given.

    Raises:
        UserError: a file that cannot be read, or a value that transformers refuses.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    file = directory / "generation_config.json"
    read_from = str(file)
    try:
        config: Any = DiffusionGemmaGenerationConfig()
        if file.exists():
            config = DiffusionGemmaGenerationConfig.from_pretrained(directory)
        config.update(**config._get_default_generation_params(), defaults_only=True)  # as `generate()` does
        config.validate()
        read_from = f"the sampler's settings, {in_words(given)} set here"
        if "entropy_bound" in given:
            config.sampler_config = EntropyBoundSamplerConfig(entropy_bound=given.pop("entropy_bound"))
        config.update(**given)
        config.validate()
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{read_from}: {first_line(error)}") from error
    stop = config.eos_token_id
    stops = stop if isinstance(stop, list) else [] if stop is None else [stop]
    return SamplerSettings(
        max_new_tokens=config.max_new_tokens,
        max_denoising_steps=config.max_denoising_steps,
        entropy_bound=config.sampler_config.entropy_bound,
        t_min=config.t_min,
        t_max=config.t_max,
        stability_threshold=config.stability_threshold,
        confidence_threshold=config.confidence_threshold,
        stop_ids=frozenset(stops),
        pad_id=config.pad_token_id,
    )
