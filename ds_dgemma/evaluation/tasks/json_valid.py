"""The answer is JSON, also within a Markdown fence; and how much of the reference's object it has."""

import json
import re
from typing import Any

from ds_dgemma.evaluation.questions import Question
from ds_dgemma.evaluation.scores import Score

FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?```\s*", re.DOTALL)
NONE: Any = object()


def json_valid(question: Question, answer: str) -> Score:
    """`valid`: it parses; `equal`: to the reference as JSON, where that is JSON."""
    said, wanted = parsed(answer), parsed(question.reference["content"])
    right = {"valid": (said is not NONE, 1)}
    if wanted is not NONE:
        right["equal"] = (said is not NONE and said == wanted, 1)
    return Score(right)


def parsed(text: str) -> Any:
    """The value, or NONE."""
    fenced = FENCE.fullmatch(text)
    try:
        return json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return NONE
