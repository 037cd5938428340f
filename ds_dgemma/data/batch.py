"""Example and Batch: the two containers between data, objective and model.

Shapes: D documents, S clean tokens of all documents, one behind another, A targets of the AR loss, C scored canvases,
L canvas tokens, M canvases that get a first guess; I images of P patches with D numbers each, K tokens that stand for
them. Nothing is padded but patches. A batch holds its noise already: the objective
that reads it draws nothing. What decides the shape of a computation is there as host integers too, so no device is
asked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch


class Span(NamedTuple):
    """Tokens of a document with a weight of their own: an answer."""

    start: int
    end: int  # behind the last; fill is not counted
    weight: float  # what each of them counts for in both losses; 0: an answer that is not to be learned
    number: int  # of the answer in its row, a part of the key of its noise


class Place(NamedTuple):
    """Where a canvas is cut from a document."""

    start: int  # position of its first token
    span: int
    number: int  # in its span


class Image(NamedTuple):
    """An image in a document."""

    start: int  # position of its first soft token; the tokens that mark its begin and its end stand around them
    tokens: int  # soft tokens
    file: str
    digest: str  # of the file's bytes


@dataclass(frozen=True)
class Pictures:
    """The images of a batch, in reading order."""

    blocks: tuple[tuple[int, int, int], ...]  # [I] document, its first soft token and the one behind, on the host
    place_K: torch.Tensor  # int64, the clean tokens that stand for them
    pixel_values_IPD: torch.Tensor  # fp32
    position_IP2: torch.Tensor  # int64, column and row of a patch; -1: padding

    def to(self, device: torch.device | str) -> "Pictures":
        """Copy the tensors to `device`."""
        return replace(self, **_moved(self, device))


@dataclass(frozen=True)
class Example:
    """One document as tokens. The last span is filled with EOS to a whole number of canvases; where another is filled,
    the fill stands in its last canvas only.
    """

    sample_id: int  # row of its source, the key of its noise: the same in every epoch and on any topology
    tokens_S: np.ndarray  # int64
    spans: tuple[Span, ...]  # in order, apart
    ar_weight_S: np.ndarray  # fp32, what each token counts for as a target of the AR loss; the first is nobody's
    canvas_length: int
    eos_id: int
    is_cut: bool = False  # its last span goes on: no EOS follows
    starts_anywhere: bool = False  # running text: its canvases are cut from another token in every epoch
    images: tuple[Image, ...] = ()

    @property
    def canvases(self) -> tuple[Place, ...]:
        """All its canvases, cut from the first token of each learned span."""
        return self.canvases_from(0)

    def canvases_from(self, offset: int) -> tuple[Place, ...]:
        """All its canvases, the first of each span `offset` tokens behind the span's begin, or at its begin where
        nothing would be left.
        """
        return tuple(self._places(offset))

    def _places(self, offset: int) -> Iterator[Place]:
        length = self.canvas_length
        for number, span in enumerate(self.spans):
            begin = span.start + offset if span.start + offset + length <= span.end else span.start
            for k in range(self._count(span, span.end - begin) if span.weight else 0):
                yield Place(begin + k * length, number, k)

    def _count(self, span: Span, tokens: int) -> int:
        """How many canvases hold the last `tokens` of a span, and an EOS."""
        if self.is_cut and span is self.spans[-1]:
            return tokens // self.canvas_length
        return -(-(tokens + int(self.tokens_S[span.end - 1] != self.eos_id)) // self.canvas_length)

    def target_L(self, place: Place) -> np.ndarray:
        """The clean tokens of a canvas, EOS behind its span."""
        end = min(self.spans[place.span].end, place.start + self.canvas_length)
        target_L = np.full(self.canvas_length, self.eos_id, dtype=np.int64)
        target_L[: max(end - place.start, 0)] = self.tokens_S[place.start : end]
        return target_L


@dataclass(frozen=True)
class Batch:
    """A micro-batch, noise included."""

    clean_ids_S: torch.Tensor  # int64
    position_S: torch.Tensor  # int64, of a clean token in its document
    ar_place_A: torch.Tensor  # int64, clean tokens that are targets of the AR loss: never a document's first
    ar_weight_A: torch.Tensor  # fp32, what each counts for
    canvas_ids_CL: torch.Tensor  # int64, noised
    target_ids_CL: torch.Tensor  # int64, clean
    canvas_weight_CL: torch.Tensor  # fp32, of a token in the diffusion loss
    canvas_start_C: torch.Tensor  # int64, position of a canvas's first token in its document
    noise_level_C: torch.Tensor  # fp32, probability that a canvas's token was drawn anew
    documents: tuple[int, ...]  # [D] clean tokens of each, on the host
    canvases: tuple[tuple[int, int], ...]  # [C] document and start of each, on the host
    # The canvases that get a first guess: those whose self-conditioning coin is true, or the first, whose guess counts
    # for nothing, so that every rank makes one and collectives stay in step
    guessed: tuple[int, ...]  # on the host
    guessed_M: torch.Tensor  # int64, the same
    coin_M: torch.Tensor  # bool
    sample_ids: tuple[int, ...]  # [D]
    noise_levels: tuple[float, ...]  # [C] to the last bit, on the host
    pictures: Pictures | None = None  # None: no document has images

    def with_coins(self, coin_C: torch.Tensor) -> "Batch":
        """The same batch with other self-conditioning coins, bool [C] on the CPU."""
        guessed = tuple(coin_C.nonzero().flatten().tolist()) or (0,)
        guessed_M = torch.tensor(guessed)
        return replace(self, guessed=guessed, guessed_M=guessed_M, coin_M=coin_C[guessed_M])

    @property
    def self_condition_C(self) -> torch.Tensor:
        """Bool [C]: the coins."""
        coins = torch.zeros_like(self.canvas_start_C, dtype=torch.bool)
        return coins.index_copy(0, self.guessed_M, self.coin_M)

    def to(self, device: torch.device | str) -> "Batch":
        """Copy the tensors to `device`."""
        return replace(self, **_moved(self, device), pictures=self.pictures and self.pictures.to(device))

    def canvases_of(self, document: int) -> list[int]:
        """The numbers of a document's canvases."""
        return [number for number, (of, _) in enumerate(self.canvases) if of == document]

    def counting(self, documents: Sequence[bool]) -> "Batch":
        """The same batch, in which only some documents count for the losses."""
        counts_D = torch.tensor(documents, dtype=torch.float32)
        of_A = counts_D.repeat_interleave(torch.tensor(self.documents))[self.ar_place_A]
        of_C1 = counts_D[[document for document, _ in self.canvases]].unsqueeze(-1)
        return replace(self, ar_weight_A=self.ar_weight_A * of_A, canvas_weight_CL=self.canvas_weight_CL * of_C1)

    def counts(self) -> tuple[float, float]:
        """Tokens scored by the diffusion loss and by the AR loss, each by its weight."""
        return float(self.canvas_weight_CL.double().sum()), float(self.ar_weight_A.double().sum())

    def tokens(self) -> int:
        """Tokens read by the model: clean ones, and those of scored canvases."""
        return self.clean_ids_S.numel() + self.canvas_ids_CL.numel()


def _moved(held: "Batch | Pictures", device: torch.device | str) -> dict[str, torch.Tensor]:
    return {
        field.name: value.to(device, non_blocking=True)
        for field in fields(held)
        if isinstance(value := getattr(held, field.name), torch.Tensor)
    }
