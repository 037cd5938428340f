"""The answer holds the reference, case and runs of white space aside."""

from ds_dgemma.evaluation.questions import Question
from ds_dgemma.evaluation.scores import Score


def contains(question: Question, answer: str) -> Score:
    """As whole text, anywhere in the answer."""
    reference, said = (" ".join(text.split()).casefold() for text in (question.reference["content"], answer))
    return Score({"contains": (reference in said, 1)})
