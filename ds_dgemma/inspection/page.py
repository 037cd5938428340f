"""The inspection as one HTML file that needs nothing beside it."""

from collections.abc import Iterator
from html import escape
from pathlib import Path

from ds_dgemma.inspection.sequences import Sequence
from ds_dgemma.inspection.summary import Summary

STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; color: #222; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f7f7f7; padding: 1em; }
table { border-collapse: collapse; } td { padding: 0 1em 0 0; }
.context { color: #888; } .learned { color: #060; font-weight: bold; } .fill { color: #03c; }
.replaced { color: #c00; font-weight: bold; } .kept { color: #060; } .warning { color: #a60; }
.begins { border-left: 2px solid #333; } .canvas { border-left: 1px dashed #333; }
.bar { background: #8ab; display: inline-block; height: .8em; }
"""


def write_page(path: Path, summaries: list[Summary], shown: list[Sequence], told: list[str]) -> None:
    """Write the page."""
    body = "\n".join([*(part for summary in summaries for part in _figures(summary)), *map(_line, told)])
    rows = "\n".join(part for sequence in shown for part in _sequence(sequence))
    legend = " ".join(f'<span class="{role}">{role}</span>' for role in ("context", "learned", "fill", "replaced"))
    path.write_text(
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>ds-dgemma inspect</title>\n'
        f"<style>{STYLE}</style>\n<h1>What the model sees</h1>\n{body}\n<p>{legend}</p>\n{rows}\n</html>\n",
        encoding="utf-8",
    )


def _line(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _figures(summary: Summary) -> Iterator[str]:
    yield f"<h2>{escape(summary.name)}</h2>"
    yield _line(
        f"{summary.rows:,} rows, {summary.report}; {summary.tokens:,} tokens, {summary.learned_tokens:,} of them "
        f"learned (fill left out), {summary.canvases:,} canvases; {summary.rows_in_several:,} rows in several sequences"
    )
    yield from (f'<p class="warning">warning: {escape(warning)}</p>' for warning in summary.warnings)
    edges, most = summary.length_edges, max(summary.length_counts, default=1)
    bars = [
        f"<tr><td>{low:,} to {high:,}</td><td>"
        f'<span class="bar" style="width:{30 * count / max(most, 1):.1f}em"></span> {count:,}</td></tr>'
        for low, high, count in zip(edges, edges[1:], summary.length_counts, strict=False)
    ]
    yield f"<table>{''.join(bars)}</table>"


def _sequence(sequence: Sequence) -> Iterator[str]:
    example = sequence.example
    yield f"<h3>{escape(sequence.where)}: {len(example.tokens_S):,} tokens</h3>"
    begins = {span.start for span in sequence.learned}
    starts = {place.start for place in example.canvases}
    tokens = []
    for place, (text, role) in enumerate(zip(sequence.shown, sequence.roles, strict=True)):
        border = " begins" if place in begins else " canvas" if place in starts else ""
        tokens.append(_token(text, role + border, f"{place}: {int(example.tokens_S[place])}"))
    yield f"<pre>{''.join(tokens)}</pre>"
    for canvas in sequence.noisy:
        yield _line(str(canvas))
        noised = (
            _token(text, "replaced" if is_replaced else "kept", "")
            for text, is_replaced in zip(canvas.text, canvas.replaced, strict=True)
        )
        yield f"<pre>{''.join(noised)}</pre>"


def _token(text: str, style: str, title: str) -> str:
    return f'<span class="{style}" title="{title}">{escape(text)}</span>'
