"""What the model will see of some rows: the clean sequence with the role of every token, and its canvases with their
noise.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from ds_dgemma.data.batch import Example, Image
from ds_dgemma.data.examples import ExampleSet, row_of
from ds_dgemma.data.image_files import size_of
from ds_dgemma.objective.corruption import Corruption

CONTEXT, LEARNED, FILL = "context", "learned", "fill"  # roles of a token


@dataclass(frozen=True)
class ScoredCanvas:
    """A canvas as the first epoch's noise leaves it."""

    number: int  # among all canvases of the sequence
    start: int
    weight: float
    noise_level: float
    self_condition: bool
    text: list[str]  # of each noised token
    replaced: list[bool]

    def __str__(self) -> str:
        coin = "sees a first guess" if self.self_condition else "sees none"
        return (
            f"canvas {self.number} at token {self.start}: noise level {self.noise_level:.3f}, {coin}, "
            f"weight {self.weight:g}"
        )


@dataclass(frozen=True)
class Sequence:
    """One sequence, its first epoch's noise included."""

    source: str
    row: int  # in its source, from 0
    where: str
    example: Example
    text: list[str]  # of each token; together they are the decoded sequence
    roles: list[str]
    noisy: list[ScoredCanvas]

    def as_dict(self) -> dict[str, Any]:
        """The sequence for programs."""
        length = self.example.canvas_length
        return {
            "source": self.source,
            "row": self.row,
            "tokens": self.example.tokens_S.tolist(),
            "text": self.text,
            "role": self.roles,
            "spans": [{"start": span.start, "end": span.end, "weight": span.weight} for span in self.learned],
            "canvases": [
                {"start": place.start, "length": length, "span": self.learned.index(self.example.spans[place.span])}
                for place in self.example.canvases
            ],
            **({"images": [_image(image) for image in self.example.images]} if self.example.images else {}),
        }

    @property
    def shown(self) -> list[str]:
        """The text of each token, for people: an image's soft tokens are one box."""
        shown = list(self.text)
        for image in self.example.images:
            seen = _image(image)
            box = f"[image {seen['width']} x {seen['height']}, {image.tokens} tokens: {image.file}]"
            shown[image.start : image.start + image.tokens] = [box, *[""] * (image.tokens - 1)]
        return shown

    @property
    def learned(self) -> list[Any]:
        """The spans that are learned."""
        return [span for span in self.example.spans if span.weight]


def _image(image: Image) -> dict[str, Any]:
    """An image for programs; its size is that of its file, in pixels."""
    width, height = size_of(Path(image.file).read_bytes())
    return {"start": image.start, "tokens": image.tokens, "file": image.file, "width": width, "height": height}


def sequences(examples: ExampleSet, corruption: Corruption, tokenizer: PreTrainedTokenizerFast) -> Iterator[Sequence]:
    """Every sequence, source after source."""
    for place in range(len(examples)):
        example = examples[place]
        source, row = row_of(example.sample_id)
        yield Sequence(
            source=examples.sources[source].source.name,
            row=row,
            where=examples.where(example.sample_id),
            example=example,
            text=texts(example.tokens_S.tolist(), tokenizer),
            roles=roles(example),
            noisy=list(scored(example, corruption, tokenizer)),
        )


def scored(example: Example, corruption: Corruption, tokenizer: PreTrainedTokenizerFast) -> Iterator[ScoredCanvas]:
    """The canvases that the first epoch scores."""
    starts = [place.start for place in example.canvases]
    for place in corruption.choose(example, 0):
        canvas = corruption.corrupt(example, 0, place)
        yield ScoredCanvas(
            number=sum(start <= place.start for start in starts) - 1,
            start=place.start,
            weight=canvas.weight,
            noise_level=canvas.noise_level,
            self_condition=canvas.self_condition,
            text=texts(canvas.noised_L.tolist(), tokenizer),
            replaced=(canvas.noised_L != canvas.target_L).tolist(),
        )


def roles(example: Example) -> list[str]:
    """The role of every token of the clean sequence."""
    found = [CONTEXT] * len(example.tokens_S)
    for span in example.spans:
        if span.weight:
            found[span.start : span.end] = [LEARNED] * (span.end - span.start)
    end = example.spans[-1].end
    found[end:] = [FILL] * (len(found) - end)
    return found


def texts(ids: list[int], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of each token; of those that share a character the last has it, so all together are the decoded text."""
    stream = DecodeStream(skip_special_tokens=False)
    backend = tokenizer.backend_tokenizer
    return [stream.step(backend, token) or "" for token in ids]
