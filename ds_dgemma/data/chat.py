"""A conversation as tokens: the prompt that `generate` will be given, and the response that is learned.

For an assistant's turn the prompt is the template's rendering of all messages before it with the generation
prompt; the response is what the template writes from there to the end of that turn, later turns cut away.
Generation tags in the template are not needed. Three rules keep training and generation the same text:

- *Where the response starts.* Usually the prompt is a prefix of the rendered conversation. Some generation
  prompts say more than a rendered turn does (an empty thought channel in templates of Gemma 4's larger
  models): then the response starts where the turn's own content does, and the prompt stays what `generate`
  sees. Anything else is refused.
- *Tokens.* The prompt is tokenized alone, as in generation; the response is the rest of prompt + response
  tokenized together, or, where a token would straddle the border, the response tokenized alone.
- *Where it ends.* White space after the last special token (`<turn|>\\n`) separates turns and is never
  generated, so it is not learned. A template that ends its turns with plain text keeps all of it.
"""

from dataclasses import dataclass
from typing import Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from ds_dgemma.data.sources import Conversations, Message
from ds_dgemma.errors import UserError

MAX_TURNS = 1024  # assistant turns of one conversation: sample ids leave room for them
CONTENT_MARK = "\ue000"  # a private-use character, stands where a turn's content goes


@dataclass(frozen=True)
class Turn:
    """One assistant's turn and all that came before it, as token ids."""

    sample_id: int  # the row, or with every turn learned: row * MAX_TURNS + number of the assistant's turn
    prompt_ids: list[int]
    response_ids: list[int]  # no EOS of ours yet


def row_of(sample_id: int, assistant_turns: Literal["last", "all"]) -> int:
    """Return the row that a sample id was made from."""
    return sample_id // MAX_TURNS if assistant_turns == "all" else sample_id


def tokenize_turns(
    conversations: Conversations,
    rows: range,
    tokenizer: PreTrainedTokenizerFast,
    assistant_turns: Literal["last", "all"],
) -> list[Turn]:
    """Tokenize the learned turns of some rows in one call of the tokenizer, which has threads of its own.

    Raises:
        UserError: a row that the template cannot render, or that has text without a token.
    """
    sample_ids, prompts, responses = [], [], []
    for row in rows:
        try:
            messages = conversations[row]
            ends = [end for end, message in enumerate(messages, 1) if message["role"] == "assistant"]
            if len(ends) > MAX_TURNS:
                raise UserError(f"{len(ends)} assistant turns, expected at most {MAX_TURNS}.")
            for turn, end in enumerate(ends) if assistant_turns == "all" else [(0, ends[-1])]:
                prompt, response = split_last_turn(messages[:end], tokenizer)
                sample_ids.append(row * MAX_TURNS + turn if assistant_turns == "all" else row)
                prompts.append(prompt)
                responses.append(response)
        except UserError as error:
            raise UserError(f"{conversations.where(row)}: {error}") from error
    turns = [Turn(*turn) for turn in zip(sample_ids, *_tokenize(prompts, responses, tokenizer), strict=True)]
    unknown = tokenizer.unk_token_id
    for turn in turns:
        if unknown is not None and (unknown in turn.prompt_ids or unknown in turn.response_ids):
            row = row_of(turn.sample_id, assistant_turns)
            raise UserError(
                f"{conversations.where(row)}: the tokenizer has no token for a part of this conversation, which would "
                f"become {tokenizer.unk_token}. Change the text, the chat template or the tokenizer."
            )
    return turns


def split_last_turn(messages: list[Message], tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    """Render a conversation that ends with the assistant as (prompt, response): the first rule above."""
    prompt = _render(messages[:-1], tokenizer, add_generation_prompt=True)
    whole = _render(messages, tokenizer, add_generation_prompt=False)
    if prompt and whole.startswith(prompt):
        return prompt, _some(whole[len(prompt) :])
    marked = [*messages[:-1], {"role": "assistant", "content": CONTENT_MARK}]
    before_content = _render(marked, tokenizer, add_generation_prompt=False).rpartition(CONTENT_MARK)[0]
    if before_content and prompt.startswith(before_content) and whole.startswith(before_content):
        return prompt, _some(whole[len(before_content) :])
    raise UserError(
        "the chat template renders this conversation differently once the answer is there, so where the "
        f"answer starts is unknown.\n  for generation: ...{prompt[-80:]!r}\n"
        f"  with the answer: ...{whole[-80:]!r}\n"
        "  A template that rewrites or joins earlier turns cannot be trained on: change it, or the data."
    )


def _some(response: str) -> str:
    if not response.strip():
        raise UserError("the chat template writes nothing for the answer, so there is nothing to learn.")
    return response


def _render(messages: list[Message], tokenizer: PreTrainedTokenizerFast, add_generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template, which says how "
            "a conversation is written. Put a chat_template.jinja beside its tokenizer.json."
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError) as error:
        raise UserError(f"the chat template refuses this conversation: {error}") from error
    assert isinstance(text, str)  # one conversation, not tokenized
    return text


def _tokenize(
    prompts: list[str], responses: list[str], tokenizer: PreTrainedTokenizerFast
) -> tuple[list[list[int]], list[list[int]]]:
    """Tokenize by the module's second and third rule."""
    texts = prompts + [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    prompt_ids, whole_ids = ids[: len(prompts)], ids[len(prompts) :]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    response_ids = []
    for prompt, whole, response in zip(prompt_ids, whole_ids, responses, strict=True):
        if whole[: len(prompt)] == prompt:
            learned = whole[len(prompt) :]
        else:
            learned = tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"]
        response_ids.append(_without_separator(learned, tokenizer, special))
    return prompt_ids, response_ids


def _without_separator(ids: list[int], tokenizer: PreTrainedTokenizerFast, special: set[int]) -> list[int]:
    after_special = max((place + 1 for place, token in enumerate(ids) if token in special), default=len(ids))
    rest = tokenizer.decode(ids[after_special:])
    assert isinstance(rest, str)  # one sequence
    return ids if rest.strip() else ids[:after_special]
