"""The calls of tools that an answer makes: their names, and their arguments, against the reference's."""

import json
import re
from typing import Any

from ds_dgemma.errors import UserError
from ds_dgemma.evaluation.questions import Question
from ds_dgemma.evaluation.scores import Score
from ds_dgemma.evaluation.tasks.json_valid import same_json

CALL = re.compile(r"<\|tool_call>(?:call:)?\s*([\w.:\-]+)\s*(\{.*?\})\s*<tool_call\|>", re.DOTALL)
QUOTE = '<|"|>'  # Gemma's, around strings
BARE_KEY = re.compile(r"([{,]\s*)([A-Za-z_][\w.\-]*)(\s*):")


def tool_call(question: Question, answer: str) -> Score:
    """`name`: the calls' names in order; `call`: names and arguments. Calls in Gemma's form or with JSON arguments."""
    wanted = [
        (call["function"]["name"], call["function"]["arguments"]) for call in question.reference.get("tool_calls", ())
    ]
    if not wanted:
        raise UserError("the reference calls no tool: its last message has no tool_calls.")
    said = [(match[1], arguments_of(match[2])) for match in CALL.finditer(answer)]
    return Score(
        {
            "name": ([name for name, _ in said] == [name for name, _ in wanted], 1),
            "call": (same_json([list(call) for call in said], [list(call) for call in wanted]), 1),
        }
    )


def arguments_of(text: str) -> Any:
    """An object as JSON, or in Gemma's form: bare keys, strings between its own quotes. None: neither."""
    pieces = text.split(QUOTE)
    if len(pieces) % 2 == 0:
        return None
    written = "".join(
        json.dumps(piece) if number % 2 else BARE_KEY.sub(r'\1"\2"\3:', piece) if QUOTE in text else piece
        for number, piece in enumerate(pieces)
    )
    for attempt in (written, BARE_KEY.sub(r'\1"\2"\3:', written)):
        try:
            return json.loads(attempt)
        except ValueError:
            continue
    return None
