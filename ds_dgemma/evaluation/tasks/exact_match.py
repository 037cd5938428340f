"""The answer is the reference, white space at both ends aside."""

from ds_dgemma.evaluation.questions import Question
from ds_dgemma.evaluation.scores import Score


def exact_match(question: Question, answer: str) -> Score:
    """Case and everything within count."""
    return Score({"exact": (answer.strip() == question.reference["content"].strip(), 1)})
