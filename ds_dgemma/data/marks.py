"""Words in a text that mean something elsewhere and nothing here: they are learned as plain text, and told."""

import re

from ds_dgemma.data.messages import Message, words_of

# what other models write around thoughts and calls; here it would be learned as text
FOREIGN = ("<think>", "<tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<function=")
IMAGE_MARK = re.compile(r"<image( ?\d+)?>")


def may_have_marks(messages: list[Message]) -> bool:
    """False where no message has a FOREIGN mark, nor a place for an image."""
    for message in messages:
        content = message["content"]
        if type(content) is not str or "<" in content or "[" in content:
            return True
    return False


def foreign_marks(messages: list[Message]) -> list[str]:
    """The FOREIGN marks in answers, once for each answer that has one."""
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    return [mark for text in answers for mark in FOREIGN if mark in text]


def image_marks(messages: list[Message]) -> int:
    """Texts with a place for an image that stays what it is, text."""
    texts = [words_of(message["content"]) for message in messages if message["role"] != "assistant"]
    return sum("<image" in text and IMAGE_MARK.search(text) is not None for text in texts)
