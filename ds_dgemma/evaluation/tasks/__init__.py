"""Tasks: what makes an answer right. A task is a function of one question and the answer's text in a file of its name.

To add one: a file here, and a line below. Users bring their own as `python:FILE:function`.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from ds_dgemma.errors import UserError, did_you_mean, first_line
from ds_dgemma.evaluation.questions import Question
from ds_dgemma.evaluation.scores import Score
from ds_dgemma.evaluation.tasks.contains import contains
from ds_dgemma.evaluation.tasks.exact_match import exact_match
from ds_dgemma.evaluation.tasks.json_valid import json_valid
from ds_dgemma.evaluation.tasks.multiple_choice import multiple_choice
from ds_dgemma.evaluation.tasks.number import number
from ds_dgemma.evaluation.tasks.sudoku import sudoku
from ds_dgemma.evaluation.tasks.tool_call import tool_call

Task = Callable[[Question, str], Score]

# What stands beside the measures in a report, a sample and a record of `metrics.jsonl`
TAKEN = {
    *("examples", "groups", "where", "reference", "answer", "kind", "step", "answers", "sampler", "not_finite"),
    *("stopped", "length_to_reference", "steps_per_canvas", "tokens_per_forward", "seconds"),
}

TASKS: dict[str, Task] = {
    "contains": contains,
    "exact_match": exact_match,
    "json_valid": json_valid,
    "multiple_choice": multiple_choice,
    "number": number,
    "sudoku": sudoku,
    "tool_call": tool_call,
}


def find_task(name: str) -> Task:
    """A task by its name, or a user's function by `python:FILE:function`.

    Raises:
        UserError: no such task, file or function.
    """
    if not name.startswith("python:"):
        if name not in TASKS:
            known = f"{', '.join(TASKS)}, python:FILE:function"
            raise UserError(f"--task {name}: known are {known}.{did_you_mean(name, TASKS)}")
        return TASKS[name]
    _, file, function = [*name.split(":", 2), "", ""][:3]
    if not Path(file).is_file() or not function:
        raise UserError(f"--task {name}: no file {file or '(none)'}, or no function named. Write python:FILE:function.")
    spec = importlib.util.spec_from_file_location(f"ds_dgemma_task_{Path(file).stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--task {name}: {file} is no Python file. Write python:FILE.py:function.")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's program
        raise UserError(f"--task {name}: {file} cannot be imported: {first_line(error)}") from error
    if not callable(own := getattr(module, function, None)):
        raise UserError(f"--task {name}: {file} has no function {function}.")
    return _own(own, name)


def _own(function: Callable[..., object], name: str) -> Task:
    """A user's function (row, answer) -> a number from 0 to 1, true or false, or such a number by measure."""

    def task(question: Question, answer: str) -> Score:
        try:
            found = function(question.row, answer)
        except (Exception, SystemExit) as error:
            raise UserError(f"--task {name} failed: {type(error).__name__}: {first_line(error)}") from error
        measures = found if isinstance(found, dict) else {name.rpartition(":")[2]: found}
        if not measures or any(not isinstance(measure, str) or measure in TAKEN for measure in measures):
            told = ", ".join(map(str, measures)) or "nothing"
            raise UserError(f"--task {name} measures {told}; names were expected that are none of {', '.join(TAKEN)}.")
        right: dict[str, tuple[float, int]] = {}
        for measure, value in measures.items():
            if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
                raise UserError(
                    f"--task {name} gave {measure} {value!r}, expected true, false or a number from 0 to 1."
                )
            right[measure] = (float(value), 1)
        return Score(right)

    return task
