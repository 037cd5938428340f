"""Sudoku: a grid of symbols for a puzzle with blanks, as `ds-dgemma make-sudoku` makes them."""

from ds_dgemma.data.sudoku import BLANK, units
from ds_dgemma.errors import UserError
from ds_dgemma.evaluation.questions import Question
from ds_dgemma.evaluation.scores import Score


def sudoku(question: Question, answer: str) -> Score:
    """Solved: a complete valid grid that keeps every clue. Cells are compared with the reference.

    The symbols are the reference's, so letters do as well as digits. A missing cell is a wrong one, and text
    after a grid leaves it unsolved.
    """
    puzzle, reference = question.prompt[-1]["content"], question.reference["content"]
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
