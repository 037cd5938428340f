"""The checkpoint's tokenizer, checked for what training needs of it."""

from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ds_dgemma.errors import UserError, first_line

VOCABULARIES = ("tokenizer.json", "tokenizer.model")


def load_tokenizer(directory: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """Load the tokenizer beside a model of `vocab_size` tokens.

    Raises:
        UserError: there is none, or it has no EOS, no chat template, or ids that the model's embedding lacks.
    """
    if not any((directory / name).is_file() for name in VOCABULARIES):  # transformers would make up an empty one
        raise UserError(
            f"{directory} has no tokenizer: neither {' nor '.join(VOCABULARIES)}. Copy it beside the model."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)  # nor ask whether to
    except Exception as error:  # transformers raises many kinds; each means that there is no usable tokenizer
        raise UserError(
            f"{directory} has no usable tokenizer: {first_line(error)}. Put tokenizer.json beside the model."
        ) from error
    problem = None
    if tokenizer.eos_token_id is None:
        problem = "has no EOS token, which fills the last canvas. Set eos_token in tokenizer_config.json."
    elif not tokenizer.chat_template:
        problem = "has no chat template, which says how a conversation is written. Put a chat_template.jinja beside it."
    elif len(tokenizer) > vocab_size:
        problem = f"has {len(tokenizer)} tokens, the model's embedding {vocab_size}. They do not belong together."
    if problem:
        raise UserError(f"the tokenizer of {directory} {problem}")
    return tokenizer


def image_tokens(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int | None]) -> tuple[str, ...]:
    """The special tokens among `ids`, which a config names for images, as they stand in a text."""
    added = tokenizer.added_tokens_decoder
    return tuple(added[number].content for number in ids if number in added and added[number].special)
