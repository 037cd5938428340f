"""The examples of a split: tokenized documents by the length policy, cut into canvases when asked for."""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import xxhash

from ds_dgemma.data.batch import Example, Span
from ds_dgemma.data.canvas import Cut
from ds_dgemma.data.reading import SHOWN
from ds_dgemma.data.sources import Source
from ds_dgemma.data.token_cache import Documents, images_of, span_counts
from ds_dgemma.errors import UserError, counted

ROW_BITS = 40  # of a sample id; above them stands the source's number


def sample_id(source: int, row: int) -> int:
    """The key of a row's noise."""
    return source << ROW_BITS | row


def row_of(sample: int) -> tuple[int, int]:
    """The source and row of a sample id."""
    return sample >> ROW_BITS, sample & (1 << ROW_BITS) - 1


@dataclass(frozen=True)
class LengthReport:
    """What the length policy did to the documents of a source."""

    kept: int  # cut ones included
    dropped: int
    truncated: int
    answers_left: int  # learned answers of truncated ones, behind the cut
    texts_cut: int  # running texts that became several examples
    max_length: int

    def __str__(self) -> str:
        total = self.kept + self.dropped
        left = f", {counted(self.answers_left, 'more answer')} left out behind the cut" if self.answers_left else ""
        texts = f", {counted(self.texts_cut, 'text')} cut into several" if self.texts_cut else ""
        return (
            f"kept {self.kept:,} of {counted(total, 'example')}, dropped {self.dropped:,}, "
            f"truncated {self.truncated:,}{left}{texts} (max_length {self.max_length:,})"
        )


@dataclass(frozen=True)
class SourceExamples:
    """The examples of one source."""

    source: Source
    number: int
    documents: Documents
    cut: Cut
    document_N: np.ndarray  # int64
    spans_N: np.ndarray  # int64, how many of the document's spans it has
    length_N: np.ndarray  # int64, tokens of its clean sequence
    piece_N: np.ndarray  # int64, which piece of a running text
    report: LengthReport

    @property
    def shortest(self) -> int:
        """Tokens that the shortest document takes."""
        table, spans = self.documents.documents, self.documents.spans
        last = table["first_span"] + span_counts(self.documents) - 1
        begin, answer = spans["start"][last], spans["end"][last] - spans["start"][last]
        one_canvas = self.cut.over_length == "truncate" or table["is_text"].any()
        canvases = 1 if one_canvas else self.cut.canvases_needed(answer)
        return int((begin + canvases * self.cut.canvas_length).min())

    def __len__(self) -> int:
        return len(self.document_N)

    def __getitem__(self, index: int) -> Example:
        document = int(self.document_N[index])
        entry = self.documents.documents[document]
        sample = sample_id(self.number, int(entry["row"]))
        ids = self.documents.tokens[int(entry["start"]) :][: int(entry["length"])]
        spans = self._spans(document)
        if entry["is_text"]:
            return self._piece_of_text(sample, ids, spans[0], int(self.piece_N[index]))
        *others, last = spans[: int(self.spans_N[index])]
        room = int(self.length_N[index])
        is_cut = last.end + int(ids[last.end - 1] != self.cut.eos_id) > room
        last = last._replace(end=min(last.end, room))
        images = images_of(self.documents, document)
        return self.cut.example(
            sample, ids[: last.end], [*others, last], int(entry["scored_from"]), is_cut, images=images
        )

    def _spans(self, document: int) -> list[Span]:
        table, found = self.documents.documents, self.documents.spans
        first = int(table[document]["first_span"])
        end = int(table[document + 1]["first_span"]) if document + 1 < len(table) else len(found)
        return [Span(*span.tolist()) for span in found[first:end]]

    def _piece_of_text(self, sample: int, ids: np.ndarray, span: Span, piece: int) -> Example:
        size = self.cut.text_tokens(span.start)
        begin = span.start + piece * size
        tokens = np.concatenate([ids[: span.start], ids[begin : begin + size]])
        own = Span(span.start, len(tokens), span.weight, piece)
        return self.cut.example(sample, tokens, [own], is_cut=own.end - own.start == size, starts_anywhere=True)


def examples_of(source: Source, number: int, held: Documents, cut: Cut) -> SourceExamples:
    """Apply the length policy to a source's documents.

    A conversation that is too long is left out; with `truncate` it ends with whole canvases of the last answer that has
    room. A running text that is too long becomes several examples.
    """
    documents = held.documents
    counts_D = span_counts(held)
    span_D = _last_spans(held, counts_D, cut)
    begin_D, end_D = (held.spans[name][span_D].astype(np.int64) for name in ("start", "end"))
    answer_D = end_D - begin_D + (held.tokens[documents["start"] + end_D - 1] != cut.eos_id)
    canvases_D = cut.canvases_kept(begin_D, answer_D)
    spans_D = span_D - documents["first_span"] + 1
    size_D = cut.text_tokens(begin_D)
    pieces_D = np.where(
        documents["is_text"], -(-(end_D - begin_D) // np.maximum(size_D, 1)) * (size_D > 0), canvases_D > 0
    )

    document_N = np.repeat(np.arange(len(documents)), pieces_D)
    piece_N = np.arange(len(document_N)) - np.repeat(np.cumsum(pieces_D) - pieces_D, pieces_D)
    size_N = size_D[document_N]
    rest_N = np.minimum(size_N, (end_D - begin_D)[document_N] - piece_N * size_N)
    text_N = cut.canvases_needed(rest_N + (rest_N < size_N))
    canvases_N = np.where(documents["is_text"][document_N], text_N, canvases_D[document_N])
    is_short_D = (canvases_D < cut.canvases_needed(answer_D)) | (spans_D < counts_D)
    report = LengthReport(
        kept=len(document_N),
        dropped=int((pieces_D == 0).sum()),
        truncated=int((is_short_D & ~documents["is_text"] & (pieces_D > 0)).sum()),
        answers_left=_answers_behind(held, span_D, counts_D, pieces_D > 0),
        texts_cut=int((pieces_D > 1).sum()),
        max_length=cut.max_length,
    )
    if cut.over_length == "error" and report.dropped:
        raise _over_length_error(source, documents, np.flatnonzero(pieces_D == 0), begin_D, answer_D, cut)
    return SourceExamples(
        source=source,
        number=number,
        documents=held,
        cut=cut,
        document_N=document_N,
        spans_N=spans_D[document_N],
        length_N=begin_D[document_N] + canvases_N * cut.canvas_length,
        piece_N=piece_N,
        report=report,
    )


def _last_spans(held: Documents, counts_D: np.ndarray, cut: Cut) -> np.ndarray:
    """The span that ends each document: its last, or with `truncate` the last learned one that has room."""
    first_D = held.documents["first_span"]
    last_D = first_D + counts_D - 1
    if cut.over_length != "truncate" or not len(first_D):
        return last_D
    has_room = (held.spans["weight"] > 0) & (held.spans["start"] + cut.canvas_length <= cut.max_length)
    found_D = np.maximum.reduceat(np.where(has_room, np.arange(len(has_room)), -1), first_D)
    return np.where(found_D < 0, last_D, found_D)


def _answers_behind(held: Documents, last_D: np.ndarray, counts_D: np.ndarray, kept_D: np.ndarray) -> int:
    """Learned answers behind the spans that end the documents which are kept."""
    place_P = np.arange(len(held.spans))
    is_behind_P = (place_P > np.repeat(last_D, counts_D)) & np.repeat(kept_D, counts_D)
    return int((is_behind_P & (held.spans["weight"] > 0)).sum())


def _over_length_error(
    source: Source, documents: np.ndarray, over: np.ndarray, begin_D: np.ndarray, answer_D: np.ndarray, cut: Cut
) -> UserError:
    count = counted(len(over), "example") + (" is" if len(over) == 1 else " are")
    lines = [f"{source.name}: {count} too long, and data.over_length is error"]
    for document in over[:SHOWN]:
        where = source.where(int(documents[document]["row"]))
        lines.append(f"  {where}: {cut.too_long(int(begin_D[document]), int(answer_D[document]))}")
    return UserError("\n".join([*lines, "  Raise data.max_length, or set data.over_length to drop or truncate."]))


def _digest_of_images(held: Documents) -> str:
    return f" {xxhash.xxh3_64_hexdigest(held.images['digest'].tobytes())}" if len(held.images) else ""


@dataclass(frozen=True)
class ExampleSet:
    """The examples of all sources, one after another."""

    sources: tuple[SourceExamples, ...]
    told: tuple[str, ...] = ()  # what a user should know of their rows

    @cached_property
    def _firsts(self) -> list[int]:
        return list(accumulate(self.sizes, initial=0))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Examples of each source."""
        return tuple(len(source) for source in self.sources)

    @property
    def lengths_N(self) -> np.ndarray:
        """Tokens of the clean sequences."""
        return np.concatenate([source.length_N for source in self.sources])

    @property
    def digest(self) -> str:
        """Of all sources: their content, what is learned of it, and how often it comes."""
        return " ".join(f"{examples.source.use}{_digest_of_images(examples.documents)}" for examples in self.sources)

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, index: int) -> Example:
        number = bisect_right(self._firsts, index) - 1
        return self.sources[number][index - self._firsts[number]]

    def report(self, split: str) -> list[str]:
        """What became of the rows of a split, a line for each source and for what a user should know of it."""
        alone = len(self.sources) == 1
        named = [f"{'' if alone else f'{one.source.name}: '}{one.report}" for one in self.sources]
        return [f"{split}: {line}" for line in [*named, *self.told]]

    def where(self, sample: int) -> str:
        """Say where the row of a sample id is."""
        source, row = row_of(sample)
        return self.sources[source].source.where(row)
