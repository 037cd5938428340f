"""Rows to tokenized documents, a piece of work at a time; what is wrong with a row is noted, not raised."""

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass

import transformers
from transformers import PreTrainedTokenizerFast

from ds_dgemma.config_data import DataSection
from ds_dgemma.data.chat import Document, tokenize_rows
from ds_dgemma.data.reading import Reading
from ds_dgemma.data.sources import Chunk, Source, read_rows

FORMAT = 2  # raise it when what is made of a row changes


@dataclass(frozen=True)
class RowReader:
    """What is made of a source's rows."""

    source: Source
    tokenizer: PreTrainedTokenizerFast
    data: DataSection
    image_tokens: Collection[str]

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
            sorted(self.image_tokens),
            tokenizer.backend_tokenizer.to_str(),
            tokenizer.chat_template,
            {name: str(token) for name, token in tokenizer.special_tokens_map.items()},  # templates read them
        ]
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()

    def read(self, chunk: Chunk) -> tuple[list[Document], Reading]:
        """The documents of a piece of work, and what was seen in it."""
        reading, documents = Reading(), []
        found = tokenize_rows(
            list(read_rows(chunk, self.source.layout, reading)),
            self.tokenizer,
            self.source.learn,
            self.data.control_tokens,
            self.data.chat_template_kwargs,
            self.image_tokens,
        )
        for made in found:
            if isinstance(made, Document):
                documents.append(made)
            else:
                reading.bad(*made)
        return documents, reading
