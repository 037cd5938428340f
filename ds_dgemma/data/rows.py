"""Rows to tokenized documents, a piece of work at a time; what is wrong with a row is noted, not raised."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast

from ds_dgemma.config.data import DataSection
from ds_dgemma.data.chat import Document, tokenize_rows
from ds_dgemma.data.drafter import Drafter
from ds_dgemma.data.image_files import ImageFiles
from ds_dgemma.data.reading import Reading
from ds_dgemma.data.sources import Chunk, Source, read_rows

FORMAT = 6  # raise it when what is made of a row changes, or how it is kept


@dataclass(frozen=True)
class RowReader:
    """What is made of a source's rows."""

    source: Source
    tokenizer: PreTrainedTokenizerFast
    data: DataSection
    images: ImageFiles

    @property
    def digest(self) -> str:
        """Equal digests, equal documents."""
        tokenizer, data = self.tokenizer, self.data
        parts = [
            FORMAT,
            transformers.__version__,
            self.source.digest,
            self.source.learn,
            data.invalid,
            data.control_tokens,
            data.chat_template_kwargs,
            self.images.settings,
            tokenizer.backend_tokenizer.to_str(),
            tokenizer.chat_template,
            {name: str(token) for name, token in tokenizer.special_tokens_map.items()},  # templates read them
        ]
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()

    def read(self, chunk: Chunk) -> tuple[list[Document], Reading]:
        """The documents of a piece of work, and what was seen in it."""
        reading, documents, drafter = Reading(), [], self._drafter
        drafter.unread.clear()
        for made in tokenize_rows(list(read_rows(chunk, self.source, reading)), drafter):
            if isinstance(made, Document):
                documents.append(made)
            else:
                reading.bad(*made)
        reading.unread += drafter.unread
        return documents, reading

    @cached_property
    def _drafter(self) -> Drafter:
        """It learns what the template does, so it is kept from piece to piece."""
        data, ignore = self.data, self.source.layout.ignore
        policy, variables = data.control_tokens, data.chat_template_kwargs
        return Drafter(self.tokenizer, self.source.learn, policy, variables, self.images, ignore)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_drafter"}  # compiled templates stay here
