"""The answer's last number is the reference's, as in GSM8K: what follows `####` counts where it is written."""

import re
from decimal import Decimal

from ds_dgemma.errors import UserError
from ds_dgemma.evaluation.questions import Question
from ds_dgemma.evaluation.scores import Score

NUMBER = re.compile(r"[-+]?\$?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


def number(question: Question, answer: str) -> Score:
    """Equal as decimals: 1,000 is 1000.0. Of `10-5` the second number is 5."""
    wanted = last_number(question.reference["content"])
    if wanted is None:
        raise UserError(f"the reference has no number: {question.reference['content'][:80]!r}.")
    return Score({"number": (last_number(answer) == wanted, 1)})


def last_number(text: str) -> Decimal | None:
    """The last number of a text, behind `####` where that stands."""
    behind = text.rpartition("####")[2].replace("\N{MINUS SIGN}", "-")
    found = list(NUMBER.finditer(behind))
    if not found:
        return None
    last = found[-1]
    is_minus = last.start() > 0 and behind[last.start() - 1].isalnum()  # of a difference
    return Decimal((last[0].lstrip("+-") if is_minus else last[0]).replace(",", "").replace("$", ""))
