"""Prompts of what a user types, as token ids."""

import re
from typing import Any

from ds_dgemma.data.chat import prompt_text
from ds_dgemma.data.image_files import place_images
from ds_dgemma.data.messages import BadRow, Message, words_of
from ds_dgemma.errors import UserError
from ds_dgemma.evaluation.open_model import Found
from ds_dgemma.evaluation.sampler import Prompt

UNDECODED = re.compile("[\ud800-\udfff]")  # what Python makes of bytes that are no text


def message_ids(
    found: Found,
    messages: list[Message],
    name: str,
    tools: list[dict[str, Any]] | None = None,
    variables: dict[str, Any] | None = None,
) -> Prompt:
    """What is put before the answer to messages that a user typed; `name` is what errors call them.

    Raises:
        UserError: text without a token, or an image that cannot be read.
    """
    tokenizer = found.model.tokenizer
    for message in messages:
        if UNDECODED.search(words_of(message["content"])):
            raise UserError(f"{name} is not UTF-8 text. Write it as UTF-8.")
        for token in found.images.tokens:
            if token in words_of(message["content"]):
                raise UserError(f"{name} holds {token}, which stands for an image: leave it out of the text.")
    try:
        text, images = prompt_text(messages, tokenizer, tools, variables, found.images)
    except BadRow as problem:
        raise UserError(f"{name}: {problem}") from problem
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    check_known(ids, found, name)
    image_id: Any = tokenizer.convert_tokens_to_ids(found.images.tokens[0]) if images else None
    placed = place_images(ids, image_id, images)
    return Prompt(ids, placed)


def check_known(ids: list[int], found: Found, name: str) -> None:
    """Refuse text that has no tokens.

    Raises:
        UserError: a part of it became the unknown token.
    """
    tokenizer = found.model.tokenizer
    if tokenizer.unk_token_id in ids:
        raise UserError(
            f"{name}: the tokenizer of {found.source} has no token for a part of it, which would become "
            f"{tokenizer.unk_token}. Change the text."
        )
