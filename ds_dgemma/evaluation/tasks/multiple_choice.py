"""A letter of several: the answer's first letter that stands alone is the reference's."""

import re

from ds_dgemma.errors import UserError
from ds_dgemma.evaluation.questions import Question
from ds_dgemma.evaluation.scores import Score

# "answer is B", "Answer: (B)" before a bare letter, which may be a word such as A or I
SAID = re.compile(r"(?i:\banswer\s*(?:is|:)?)\s*[*(\[`]*([A-Z]|[a-z](?=[).\]*`\s]*$))\b(?! [a-z])")
WORDS = re.compile(r"\b(?:A|I) (?=[a-z])|\bI'")  # of a sentence
ALONE = re.compile(r"(?<![A-Za-z'])([A-Z])(?=[).:,\]*}`?!\s]|$)")


def multiple_choice(question: Question, answer: str) -> Score:
    """Letters A to Z."""
    wanted = chosen(question.reference["content"])
    if wanted is None:
        raise UserError(f"the reference names no choice, a letter: {question.reference['content'][:80]!r}.")
    return Score({"choice": (chosen(answer) == wanted, 1)})


def chosen(text: str) -> str | None:
    """The letter that a text chooses."""
    said = [match[1].upper() for match in SAID.finditer(text)]
    alone = [match[1] for part in (WORDS.sub("", text), text) for match in ALONE.finditer(part)]
    return said[-1] if said else alone[0] if alone else None
