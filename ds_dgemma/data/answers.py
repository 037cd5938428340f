"""The answers of a conversation: what the model is to say, what it is given before, and what each counts for."""

from typing import NamedTuple

from ds_dgemma.config.data import Learn
from ds_dgemma.data.formats import BadRow, Message
from ds_dgemma.data.left_out import Words, words_of_calls
from ds_dgemma.data.rendering import Render


class Answer(NamedTuple):
    """An assistant's message, a run of them that the template joins into one turn, or a part of one."""

    before: list[Message]
    upto: list[Message]  # with the answer
    last: int  # number of its last message
    weight: float | None  # by the row's own word
    words: Words  # its own


def answers_of(messages: list[Message], weights: list[float | None], render: Render) -> list[Answer]:
    """The answers of a conversation, in order.

    Raises:
        BadRow: there is none, or messages of one turn have different weights.
    """
    answers: list[Answer] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        for part in _parts(messages, number, weights[number]):
            if answers and part.last == answers[-1].last + 1 and not _apart(part, render):
                answers[-1] = _joined(answers[-1], part)
            else:
                answers.append(part)
    if not answers:
        raise BadRow("no assistant turn: nothing to learn.")
    return answers


def learned_weights(answers: list[Answer], learn: Learn) -> list[float | None]:
    """What each answer counts for: None where it is context only, 0 where it is to be left out of all losses.

    Raises:
        BadRow: nothing is learned.
    """
    if learn == "weights" and all(answer.weight is None for answer in answers):
        raise BadRow(
            "data.learn is weights, but no assistant message of this row says what it counts for: give it a weight "
            "(0 to 1), or set data.learn to last or all."
        )
    weights = [1.0 if answer.weight is None else answer.weight for answer in answers]
    if learn == "last":
        if not weights[-1]:
            raise BadRow("nothing is learned of this row: data.learn is last, and its last answer has weight 0.")
        return [None if weight else 0.0 for weight in weights[:-1]] + weights[-1:]
    if not any(weights):
        raise BadRow("nothing is learned of this row: each of its answers has weight 0. Leave it out.")
    return [*weights]


def _parts(messages: list[Message], number: int, weight: float | None) -> list[Answer]:
    """A message; or, where it holds the tools' responses, the calls before them and the content behind."""
    message, before, name = messages[number], messages[:number], f"messages[{number}]"
    content = [(f"{name}.content", message["content"])] if message["content"] else []
    thought = message.get("reasoning_content")
    calls = [(f"{name}.reasoning_content", thought)] if thought else []
    if len(message) > 2:
        calls += words_of_calls(message, name)
    if not message.get("tool_responses"):
        return [Answer(before, messages[: number + 1], number, weight, calls + content)]
    parts = []
    if message.get("tool_calls"):
        call = {key: value for key, value in message.items() if key != "tool_responses"} | {"content": ""}
        parts.append(Answer(before, [*before, call], number, weight, calls))
    if content:
        parts.append(Answer([*before, message | {"content": ""}], messages[: number + 1], number, weight, content))
    return parts


def _apart(answer: Answer, render: Render) -> bool:
    """Whether an assistant's message behind another opens a turn of its own."""
    whole = render(answer.upto, False)
    return whole.startswith((render(answer.before, True), render(answer.before, False)))


def _joined(answer: Answer, more: Answer) -> Answer:
    if answer.weight != more.weight:
        raise BadRow(
            f"the chat template joins messages[{answer.last}] and messages[{more.last}] into one turn, but their "
            f"weights are {_said(answer.weight)} and {_said(more.weight)}: give both the same. (An answer that ends a "
            "prompt of messages has weight 0: put it into the completion, or end the prompt with the user.)"
        )
    return answer._replace(upto=more.upto, last=more.last, words=answer.words + more.words)


def _said(weight: float | None) -> str:
    return "not given" if weight is None else f"{weight:g}"
