"""What was right, out of how much, in which group, so that easy questions can't hide hard ones.

A Score holds counts, never shares: the shares of a group are made once, from its sums.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Score:
    """One example's result."""

    right: Mapping[str, tuple[float, int]]  # measure → (right, of how many)
    group: dict[str, Any] = field(default_factory=dict)  # what it is reported under; equal values are one group

    def shown(self) -> dict[str, str]:
        """For a sample: 14 of 16."""
        return {measure: f"{right} of {of}" for measure, (right, of) in self.right.items()}


def summarise(scores: Iterable[Score]) -> dict[str, Any]:
    """Return `examples`, the share of each measure, and under `groups` the same for every group, in order."""
    groups: dict[str, list[Score]] = {}
    everything = list(scores)
    for score in sorted(everything, key=lambda score: [_order(value) for value in score.group.values()]):
        if score.group:
            groups.setdefault(json.dumps(score.group), []).append(score)
    return {**_shares(everything), "groups": [{**members[0].group, **_shares(members)} for members in groups.values()]}


def _order(value: Any) -> tuple[bool, Any]:
    """Numbers before everything else."""
    is_number = isinstance(value, int | float)
    return (not is_number, value if is_number else str(value))


def _shares(scores: list[Score]) -> dict[str, Any]:
    totals = {
        measure: tuple(map(sum, zip(*(score.right[measure] for score in scores), strict=True)))
        for measure in scores[0].right
    }
    return {
        "examples": len(scores),
        **{measure: right / max(of, 1) for measure, (right, of) in totals.items()},
    }


def report_table(report: dict[str, Any]) -> Table:
    """Lay a report out: a row per group, the whole last."""
    names = [name for name in report["groups"][0] if name not in report] if report["groups"] else []
    measures = [
        name for name in list(report)[list(report).index("examples") :] if isinstance(report[name], int | float)
    ]
    measures = [name for name in measures if name not in ("seed", "seconds")]
    table = Table(title=f"{report.get('run') or report['model']} on {report['data']}", title_justify="left")
    for name in [*(names or [""]), *measures]:
        table.add_column(name.replace("_", " "), justify="right")
    for group in report["groups"]:
        table.add_row(*(_cell(group.get(name, "")) for name in [*(names or [""]), *measures]))
    table.add_section()
    cells = [_cell(report[name]) for name in measures]
    table.add_row("all", *[""] * (max(len(names), 1) - 1), *cells, style="bold")
    return table


def manner_line(manner: dict[str, float]) -> str:
    """How the answers came, on one line."""
    return (
        f"{manner['stopped']:.1%} stopped, {manner['length_to_reference']:.2f} of the references' length, "
        f"{manner['steps_per_canvas']:.1f} steps a canvas, {manner['tokens_per_forward']:.1f} tokens a decoder pass, "
        f"{manner['seconds']:.1f} s"
    )


def _cell(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, float) else str(value)
