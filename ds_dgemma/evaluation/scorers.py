"""Score answers: what was right, out of how much, in which group, so that easy ones can't hide hard ones.

A scorer is a function (prompt messages, reference, answer) -> Score; `SCORERS` names them for the command
line. A Score holds counts, never shares: the shares of a group are made once, from its sums.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ds_dgemma.data.formats import Message
from ds_dgemma.data.sudoku import BLANK, units
from ds_dgemma.errors import UserError


@dataclass(frozen=True)
class Score:
    """One example's result."""

    right: dict[str, tuple[int, int]]  # measure → (right, of how many)
    group: dict[str, int]  # what the example is reported under; equal values are one group


Scorer = Callable[[list[Message], str, str], Score]


def score_sudoku(prompt: list[Message], reference: str, answer: str) -> Score:
    """Solved: a complete valid grid that keeps every clue. Cells are compared with the reference.

    The symbols are the reference's, so letters do as well as digits. A missing cell is a wrong one, and text
    after a grid leaves it unsolved.
    """
    puzzle = prompt[-1]["content"]
    size, symbols = round(len(reference) ** 0.5), set(reference)
    is_record = size in (4, 9) and len(puzzle) == len(reference) == size * size and len(symbols) == size
    if not is_record:
        raise UserError(
            f"not a Sudoku record: puzzle {puzzle[:100]!r}, solution {reference[:100]!r}. Expected 16 or 81 "
            f"cells each, `{BLANK}` for a blank, nothing else; `ds-dgemma make-sudoku` makes such files."
        )
    is_complete = len(answer) == len(reference)
    solved = (
        is_complete
        and all(clue in (BLANK, cell) for clue, cell in zip(puzzle, answer, strict=True))
        and all({answer[cell] for cell in unit} == symbols for unit in units(size))
    )
    right = [given == wanted for given, wanted in zip(answer, reference, strict=False)]
    blanks = puzzle.count(BLANK)
    filled = sum(is_right for is_right, clue in zip(right, puzzle, strict=False) if clue == BLANK)
    return Score(
        right={
            "solved": (int(solved), 1),
            "cells": (sum(right), size * size),
            "blank_cells": (filled, blanks),
        },
        group={"blanks": blanks, "clues": size * size - blanks},
    )


NOT_COLUMNS = ("model", "adapter", "data", "scorer", "seed", "groups")

SCORERS: dict[str, Scorer] = {"sudoku": score_sudoku}


def summarise(scores: Iterable[Score]) -> dict[str, Any]:
    """Return `examples`, the share of each measure, and under `groups` the same for every group, in order."""
    groups: dict[tuple[int, ...], list[Score]] = {}
    everything = list(scores)
    for score in everything:
        groups.setdefault(tuple(score.group.values()), []).append(score)
    return {
        **_shares(everything),
        "groups": [{**members[0].group, **_shares(members)} for _, members in sorted(groups.items())],
    }


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
    whole = {key: value for key, value in report.items() if key not in NOT_COLUMNS}
    group_names = [name for name in report["groups"][0] if name not in whole]
    table = Table(title=f"{report['model']} on {report['data']}", title_justify="left")
    for name in [*group_names, *whole]:
        table.add_column(name.replace("_", " "), justify="right")
    for group in report["groups"]:
        table.add_row(*(_cell(value) for value in group.values()))
    table.add_section()
    table.add_row("all", *[""] * (len(group_names) - 1), *(_cell(value) for value in whole.values()), style="bold")
    return table


def _cell(value: float) -> str:
    return f"{value:.1%}" if isinstance(value, float) else str(value)
