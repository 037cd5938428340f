"""Prompts of what a user types, as token ids."""

from typing import Any

from ds_dgemma.data.chat import prompt_text
from ds_dgemma.data.messages import BadRow, Message
from ds_dgemma.errors import UserError
from ds_dgemma.evaluation.open_model import Found


def message_ids(
    found: Found,
    messages: list[Message],
    name: str,
    tools: list[dict[str, Any]] | None = None,
    variables: dict[str, Any] | None = None,
) -> list[int]:
    """What is put before the answer to messages that a user typed; `name` is what errors call them.

    Raises:
        UserError: a message that is more than text, or text without a token.
    """
    tokenizer = found.tokenizer
    for message in messages:
        for token in found.image_tokens:
            if token in message["content"]:
                raise UserError(
                    f"{name} holds {token}, which stands for an image. Only text is answered: leave it out."
                )
    try:
        text = prompt_text(messages, tokenizer, tools, variables)
    except BadRow as problem:
        raise UserError(f"{name}: {problem}") from problem
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id in ids:
        raise UserError(
            f"{name}: the tokenizer of {found.source} has no token for a part of it, which would become "
            f"{tokenizer.unk_token}. Change the text."
        )
    return ids
