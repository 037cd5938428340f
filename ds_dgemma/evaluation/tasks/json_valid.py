"""The answer is JSON, also within a Markdown fence; and how much of the reference's object it has."""

import json
import re
from typing import Any

from ds_dgemma.evaluation.questions import Question
from ds_dgemma.evaluation.scores import Score

FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?```\s*", re.DOTALL | re.IGNORECASE)
NONE: Any = object()


def json_valid(question: Question, answer: str) -> Score:
    """`valid`: it parses; `equal`: to the reference as JSON, where that is JSON."""
    said, wanted = parsed(answer), parsed(question.reference["content"])
    right = {"valid": (said is not NONE, 1)}
    if wanted is not NONE:
        right["equal"] = (said is not NONE and same_json(said, wanted), 1)
    return Score(right)


def same_json(one: Any, other: Any) -> bool:
    """Equal values, keys in any order; in Python true is 1, in JSON it is not."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def parsed(text: str) -> Any:
    """The value, or NONE."""
    fenced = FENCE.fullmatch(text)
    try:
        return json.loads(fenced[1] if fenced else text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return NONE


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is Python's, not JSON's")
