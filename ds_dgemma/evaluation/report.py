"""An evaluation's report: a table in the terminal, JSON, Markdown, one HTML file that needs nothing beside it."""

import json
import re
from html import escape
from typing import Any

from rich.table import Table
from rich.text import Text

from ds_dgemma.evaluation.sampler_settings import in_words

SHARE = re.compile(r"(\d+\.\d)%")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; color: #222; }
table { border-collapse: collapse; } th, td { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: right; }
.bar { background: #8ab; height: .7em; display: inline-block; }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .8em; }
"""


def report_table(report: dict[str, Any]) -> Table:
    """A row per group, the whole last."""
    header, *groups, whole = _cells(report)
    table = Table(title=Text(_title(report)), title_justify="left")  # Text: no brackets of a user's are markup
    for name in header:
        table.add_column(Text(name), justify="right")
    for group in groups:
        table.add_row(*map(Text, group))
    table.add_section()
    table.add_row(*map(Text, whole), style="bold")
    return table


def manner_line(report: dict[str, Any]) -> str:
    """How the answers came, on one line."""
    manner = report["manner"]
    return (
        f"{manner['stopped']:.1%} stopped, {manner['length_to_reference']:.2f} of the references' length, "
        f"{manner['steps_per_canvas']:.1f} steps a canvas, {manner['tokens_per_forward']:.1f} tokens a decoder pass, "
        f"{manner['seconds']:.1f} s"
    )


def as_json(report: dict[str, Any]) -> str:
    """Everything."""
    return json.dumps(report, indent=2, default=str) + "\n"


def as_markdown(report: dict[str, Any]) -> str:
    """Table, manner, settings and samples."""
    header, *rows = _cells(report)
    table = [header, ["---:"] * len(header), *rows]
    lines = [f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in row)} |" for row in table]
    samples = [
        "\n\n".join(
            [f"`{sample['where']}`: {_right(sample)}", *map(_indented, (sample["reference"], sample["answer"]))]
        )
        for sample in report["samples"]
    ]
    parts = [f"# {_title(report)}", "\n".join(lines), f"{manner_line(report)}.", _settings(report)]
    return "\n\n".join([*parts, "## Samples: reference, answer", *samples]) + "\n"


def as_html(report: dict[str, Any]) -> str:
    """The same as a page, shares as bars."""
    header, *rows = _cells(report)
    body = [f"<h1>{escape(_title(report))}</h1>", "<table>", _row("th", header)]
    body += [_row("td", row) for row in rows]
    body += [
        "</table>",
        f"<p>{escape(manner_line(report))}</p>",
        f"<p>{escape(_settings(report))}</p>",
        "<h2>Samples</h2>",
    ]
    for sample in report["samples"]:
        body.append(f"<h3>{escape(sample['where'])}: {escape(_right(sample))}</h3>")
        body += [f"<p>{name}</p><pre>{escape(sample[name])}</pre>" for name in ("reference", "answer")]
    title = escape(_title(report))
    head = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n<style>{STYLE}</style>'
    return "\n".join([head, *body, "</html>"]) + "\n"


def _title(report: dict[str, Any]) -> str:
    source = f"{report['run']}, step {report['step']}," if "run" in report else report["model"]
    return f"{source} on {report['data']}"


def _cells(report: dict[str, Any]) -> list[list[str]]:
    """Header, a row per group, the whole."""
    keys = list(report)
    measures = keys[keys.index("examples") : keys.index("groups")]
    names = [name for name in (report["groups"] or [{}])[0] if name not in measures]
    header = [name.replace("_", " ") for name in [*(names or [""]), *measures]]
    groups = [
        [*(str(group[name]) for name in names), *(_cell(group[name]) for name in measures)]
        for group in report["groups"]
    ]
    whole = ["all", *[""] * (max(len(names), 1) - 1), *(_cell(report[name]) for name in measures)]
    return [header, *groups, whole]


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.1%}" if isinstance(value, float) else str(value)


def _row(kind: str, cells: list[str]) -> str:
    def shown(cell: str) -> str:
        share = SHARE.fullmatch(cell)
        bar = f'<span class="bar" style="width:{float(share[1]) / 25:.2f}em"></span> ' if share else ""
        return f"<{kind}>{bar}{escape(cell)}</{kind}>"

    return f"<tr>{''.join(map(shown, cells))}</tr>"


def _settings(report: dict[str, Any]) -> str:
    return f"Task {report['task']}, seed {report['seed']}; {in_words(report['sampler'])}."


def _right(sample: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value}" for name, value in sample.items() if name not in ("where", "reference", "answer")
    )


def _indented(text: str) -> str:
    return "    " + (text.replace("\n", "\n    ") or "(nothing)")
