"""Keys whose name sounds as if they said what is learned, and values that say yes or no."""

import re
from functools import lru_cache
from typing import Any


def listed(words: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(words.split())


# parts of keys that say what is learned: loss_weights, assistantMasks, labels
DECIDING = listed("loss mask masks masked train trainable training learn learnable weight weights labels")
# the same, of a turn: beside a conversation they are what someone thought of the whole
DECIDING_OF_A_TURN = DECIDING | listed(
    "skip skipped ignore ignored exclude excluded include included keep drop supervise supervised target label score "
    "scores reward rewards rating advantage learned trained use used"
)
# of a row, where its value is yes or no: with these, yes says that the row is not wanted; with those, no does
REFUSING, APPROVING = (
    listed("skip skipped ignore ignored exclude excluded"),
    listed("label keep include included supervise supervised target correct learned trained use used"),
)
NO, YES = listed("false no"), listed("true yes")
NUMBERS_AS_TEXT = re.compile(r"\s*[-+]?\d*\.?\d+\s*")


@lru_cache
def decides(key: str, words: frozenset[str] = DECIDING) -> bool:
    """Whether a key's name sounds as if it says what is learned."""
    return not words.isdisjoint(part.lower() for part in re.split(r"(?<=[a-z])(?=[A-Z])|[_\W]+", key))


def says(value: Any) -> bool | None:
    """Yes or no, as JSON or as a cell of text has it; None: neither."""
    if isinstance(value, bool):
        return value
    word = value.strip().lower() if isinstance(value, str) else ""
    return True if word in YES else False if word in NO else None


def is_setting(value: Any) -> bool:
    """Whether a value is a number, yes or no, or a list: no words."""
    return not isinstance(value, str) or says(value) is not None or NUMBERS_AS_TEXT.fullmatch(value) is not None


def unwanted(key: str, value: Any) -> bool:
    """Whether a row says of itself, yes or no, that it is not to be learned."""
    answer = says(value)
    return answer is not None and decides(key, REFUSING if answer else APPROVING)
