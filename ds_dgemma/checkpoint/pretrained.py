"""A model as it lies on disk or on the hub: everything that is known of it before a weight is read."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import DiffusionGemmaConfig, PreTrainedTokenizerFast

from ds_dgemma.checkpoint.weights import local_directory, model_digest
from ds_dgemma.config.data import DataSection
from ds_dgemma.data.image_files import ImageFiles, of_model
from ds_dgemma.data.tokenizer import load_tokenizer
from ds_dgemma.model.spec import read_spec, text_spec


@dataclass(frozen=True)
class Pretrained:
    """A transformers checkpoint directory."""

    directory: Path
    spec: DiffusionGemmaConfig
    tokenizer: PreTrainedTokenizerFast

    @property
    def text(self) -> Any:
        """The language model's part of the config."""
        return text_spec(self.spec)

    @cached_property
    def digest(self) -> str:
        """Of all its weights; equal digests, equal models."""
        return model_digest(self.directory)

    def images(self, data: DataSection | None = None) -> ImageFiles:
        """How images are read for it; by default none is fetched from an address."""
        allow_urls, size = (data.allow_urls, data.max_soft_tokens) if data else (False, None)
        return of_model(self.directory, self.tokenizer, self.spec, allow_urls, size)


def open_pretrained(path: str, revision: str | None = None, download: bool = True) -> Pretrained:
    """Open a directory or a hub id; `download`: fetch what is not there yet.

    Raises:
        UserError: no DiffusionGemma checkpoint, or no tokenizer that serves.
    """
    directory = local_directory(path, revision, download=download)
    spec = read_spec(str(directory))
    return Pretrained(directory, spec, load_tokenizer(directory, text_spec(spec).vocab_size))
