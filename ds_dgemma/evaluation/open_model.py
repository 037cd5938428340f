"""A model that answers: a checkpoint, with an adapter, or what a run has trained so far, in one process."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ds_dgemma.checkpoint.adapter import AdapterReader
from ds_dgemma.checkpoint.export import adapter_change, changes_of
from ds_dgemma.checkpoint.hf_weights import Change
from ds_dgemma.checkpoint.load import check_places, materialise, plain
from ds_dgemma.checkpoint.pretrained import Pretrained, open_pretrained
from ds_dgemma.checkpoint.trained_run import open_run
from ds_dgemma.checkpoint.weights import WeightReader
from ds_dgemma.data.image_files import ImageFiles
from ds_dgemma.evaluation.sampler_settings import SamplerSettings, ends_of, read_settings
from ds_dgemma.model.build import build_stack
from ds_dgemma.model.lora import possible_targets
from ds_dgemma.model.names import Place, places_of
from ds_dgemma.model.stack import DiffusionGemmaStack

ONE_THREAD_BELOW = 50_000_000  # parameters: a smaller model's CPU threads mostly wait for each other


@dataclass(frozen=True)
class Source:
    """A transformers checkpoint or a hub id, and a PEFT adapter to put onto it; or a run's directory."""

    model: str | None = None
    revision: str | None = None  # of a hub id
    adapter: Path | None = None
    run: Path | None = None
    step: int | Literal["best"] | None = None  # of a run; None: the newest

    def named(self) -> dict[str, Any]:
        """For a report."""
        return {key: str(value) for key, value in vars(self).items() if value is not None}

    def __str__(self) -> str:
        return " ".join(
            f"{value}" if key in ("model", "run") else f"{key} {value}" for key, value in self.named().items()
        )


@dataclass(frozen=True)
class Found:
    """Where everything of a source lies; no weights are read."""

    source: Source
    model: Pretrained  # the checkpoint, which the run started from
    images: ImageFiles
    settings: SamplerSettings
    change: Change | None = None  # what an adapter or a run made of the checkpoint
    bf16: bool = True  # what it computes in on a GPU


@dataclass(frozen=True)
class OpenModel:
    """A model that answers."""

    found: Found
    stack: DiffusionGemmaStack
    device: torch.device
    stop_ids: frozenset[int]  # the sampler's, and the tokenizer's EOS


def find_model(source: Source, settings: Mapping[str, Any]) -> Found:
    """Find a source's files and settings; `settings` of the sampler go before the checkpoint's.

    Raises:
        UserError: no DiffusionGemma checkpoint, no tokenizer, no adapter of this model, no such run or step.
    """
    change, bf16 = None, True
    if source.run is not None:
        run = open_run(source.run, source.step)
        source = replace(source, step=run.trained.checkpoint.step)
        model, change, bf16 = open_pretrained(str(run.model)), changes_of(run), run.bf16
    else:
        assert source.model is not None
        model = open_pretrained(source.model, source.revision)
    if source.adapter is not None:
        reader = AdapterReader(source.adapter, possible_targets(build_stack(model.spec)))
        if warning := reader.base_warning(str(source.model)):
            print(warning, file=sys.stderr)
        change = adapter_change(reader)
    return Found(source, model, model.images(), read_settings(model.directory, settings), change, bf16)


def load_model(found: Found) -> OpenModel:
    """Load it onto the GPU in bf16 (an fp32 run's in fp32), or onto the CPU in fp32; an adapter is merged.

    Raises:
        UserError: weights are missing or broken.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu and found.bf16 else torch.float32
    stack, reader = build_stack(found.model.spec), ChangedReader(found.model.directory, found.change, dtype)
    if on_gpu:  # on a CPU transformers' own experts, whose rounding `generate()` has
        from ds_dgemma.engine.expert_parallel import place_experts  # DeepSpeed takes seconds to import

        place_experts(stack, 1, 0, grouped=dtype is torch.bfloat16)
    copies = found.source.run is not None
    places = check_places(stack, places_of(stack), reader, copy_decoder_scalars=copies)
    materialise(stack, reader, places, plain(dtype, device), device=device)
    reader.close()
    if not on_gpu and sum(parameter.numel() for parameter in stack.parameters()) < ONE_THREAD_BELOW:
        torch.set_num_threads(1)
    return OpenModel(found, stack.eval(), device, ends_of(found.settings, found.model.tokenizer))


class ChangedReader(WeightReader):
    """A checkpoint with some tensors changed, each made whole where a part of it is read."""

    def __init__(self, directory: Path, change: Change | None, dtype: torch.dtype) -> None:
        super().__init__(directory)
        self._change, self._dtype = change, dtype
        self._base = WeightReader(directory)
        self._last: tuple[str, Tensor | None] = ("", None)

    def read_into(self, flat: Tensor, place: Place, start: int, stop: int) -> None:
        """As a plain reader; of a changed tensor from what it became."""
        if place.tensor != self._last[0]:
            changed = self._change(place.tensor, self._base, self._dtype) if self._change else None
            self._last = (place.tensor, changed)
        whole = self._last[1]
        if whole is None:
            super().read_into(flat, place, start, stop)
            return
        if place.experts is not None and place.rows is not None:
            whole = whole[slice(*place.experts), slice(*place.rows)]
        flat.copy_(whole.reshape(-1)[start:stop])
