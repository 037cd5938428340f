"""The inspection in a terminal, tokens coloured by role."""

from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ds_dgemma.data.reading import printable
from ds_dgemma.inspection.sequences import Sequence
from ds_dgemma.inspection.summary import Summary

STYLES = {"context": "dim", "learned": "bold green", "fill": "blue"}
CORRUPTED, KEPT = "bold red", "green"
LINES = "\n\t"  # shown as they are; other commands to a terminal are spelled
LONGEST = 1500  # tokens of a sequence that are shown


def legend() -> Text:
    """What the colours mean."""
    line = Text("tokens: ")
    for role, style in STYLES.items():
        line.append(role, style).append("  ")
    return line.append("replaced by noise", CORRUPTED).append("   ⟦ ⟧ a learned span, │ a canvas begins")


def show(console: Console, summaries: list[Summary], shown: list[Sequence], told: list[str]) -> None:
    """Print all of it."""
    for summary in summaries:
        console.print(_figures(summary))
        for warning in summary.warnings:
            console.print(Text(f"warning: {warning}", style="yellow"))
    for line in told:
        console.print(Text(line))
    if shown:
        console.print(Text())
        console.print(legend())
    for sequence in shown:
        console.print(Group(*_sequence(sequence)))


def _figures(summary: Summary) -> Table:
    table = Table(title=summary.name, show_header=False, title_justify="left")
    for name, value in (
        ("rows", f"{summary.rows:,}"),
        ("sequences", f"{summary.examples:,}: {summary.report}"),
        (
            "rows in several sequences",
            f"{summary.rows_in_several:,}, the template writes their turns differently later",
        ),
        ("tokens", f"{summary.tokens:,}, {summary.learned_tokens:,} of them learned, fill left out"),
        ("canvases", f"{summary.canvases:,}"),
        *(
            (
                f"length {low:,} to {high:,}",
                f"{'█' * round(30 * count / max(summary.length_counts, default=1))} {count:,}",
            )
            for low, high, count in zip(
                summary.length_edges, summary.length_edges[1:], summary.length_counts, strict=False
            )
            if count
        ),
    ):
        if name != "rows in several sequences" or summary.rows_in_several:
            table.add_row(name, value)
    return table


def _sequence(sequence: Sequence) -> Iterator[RenderableType]:
    example = sequence.example
    yield Text(f"\n{sequence.where}: {len(example.tokens_S):,} tokens", style="bold")
    starts = {place.start for place in example.canvases}
    begins, ends = ({getattr(span, name) for span in sequence.learned} for name in ("start", "end"))
    line = Text()
    for place, (text, role) in enumerate(zip(sequence.shown[:LONGEST], sequence.roles, strict=False)):
        line.append("⟧" if place in ends else "").append("⟦" if place in begins else "│" if place in starts else "")
        line.append(printable(text, but=LINES), STYLES[role])
    if len(sequence.shown) > LONGEST:
        line.append(f" … {len(sequence.shown) - LONGEST:,} tokens more")
    yield line
    for canvas in sequence.noisy:
        yield Text(str(canvas), style="bold")
        noisy = Text()
        for text, is_replaced in zip(canvas.text, canvas.replaced, strict=True):
            noisy.append(printable(text, but=LINES), CORRUPTED if is_replaced else KEPT)
        yield noisy
