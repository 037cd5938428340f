"""The figures of a source: what it holds, what of it is learned, and what to look at."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from ds_dgemma.data.examples import SourceExamples
from ds_dgemma.data.order import Arrangement
from ds_dgemma.errors import counted

BINS = 12


@dataclass(frozen=True)
class Summary:
    """One source of a split."""

    name: str
    rows: int
    examples: int
    tokens: int  # of all clean sequences
    learned_tokens: int  # fill left out
    canvases: int
    rows_in_several: int  # whose template writes earlier turns differently, so each has sequences of its own
    length_edges: list[int]  # of the histogram's bins
    length_counts: list[int]
    report: str
    warnings: list[str]


def summarise(source: SourceExamples, tokenizer: PreTrainedTokenizerFast) -> Summary:
    """Count a source's examples, each as the length policy left it."""
    table = source.documents.documents
    learned = canvases = stopless = 0
    control = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    for place in range(len(source)):
        example = source[place]
        learned += sum(span.end - span.start for span in example.spans if span.weight)
        canvases += len(example.canvases)
        last = int(example.tokens_S[example.spans[-1].end - 1])
        stopless += not (example.starts_anywhere or example.is_cut) and last not in control
    edges = np.linspace(0, max(int(source.length_N.max(initial=1)), 1), BINS + 1).astype(int)
    counts, _ = np.histogram(source.length_N, edges)
    _, of_row = np.unique(table["row"][~table["is_text"]], return_counts=True)
    return Summary(
        name=source.source.name,
        rows=len(source.source),
        examples=len(source),
        tokens=int(source.length_N.sum()),
        learned_tokens=learned,
        canvases=canvases,
        rows_in_several=int((of_row > 1).sum()),
        length_edges=edges.tolist(),
        length_counts=counts.tolist(),
        report=str(source.report),
        warnings=_warnings(source, learned, stopless),
    )


def _warnings(source: SourceExamples, learned: int, stopless: int) -> list[str]:
    report, found = source.report, []
    if not learned:
        found.append("nothing is learned")
    limit = f"data.max_length {report.max_length:,}"
    if report.truncated:
        found.append(f"{counted(report.truncated, 'sequence')} cut at {limit}")
    if report.answers_left:
        found.append(f"{counted(report.answers_left, 'answer')} left out behind the cut")
    if report.dropped:
        found.append(f"{counted(report.dropped, 'sequence')} left out, longer than {limit}")
    if stopless:
        found.append(
            f"no control token ends {counted(stopless, 'answer')}: the chat template has no end of turn, so only the "
            "EOS of the fill teaches when to stop"
        )
    return found


def padding_share(lengths: np.ndarray, arrangement: Arrangement, rows: int) -> float:
    """Share of padding that rows of these examples would have, `rows` of them padded to the longest."""
    if arrangement.packs_to is not None:
        packed = arrangement.rows(lengths.tolist(), 0, 0)
        return 1 - float(lengths.sum()) / (len(packed) * arrangement.packs_to)
    padded = sum(int(part.max()) * len(part) for part in np.array_split(lengths, max(1, len(lengths) // rows)))
    return 1 - float(lengths.sum()) / padded
