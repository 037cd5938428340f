"""A row's documents as text: every learned answer in one of them, as few as the chat template allows.

Documents are made from the last answer backwards. An earlier answer goes into a later one's document where its prompt
and response begin that document; where the template writes it differently once later turns are there (the released one
drops earlier thoughts), it gets a document of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ds_dgemma.data.answers import Answer
from ds_dgemma.data.control_tokens import ControlTokens
from ds_dgemma.data.formats import BadRow, Message
from ds_dgemma.data.image_files import Measured
from ds_dgemma.data.left_out import check_answer, check_context, stands
from ds_dgemma.data.rendering import Render, split


class Learned(NamedTuple):
    """An answer to learn."""

    prompt: str
    response: str  # without the white space between turns
    weight: float
    number: int  # among the learned answers of the row
    place: int  # among all its answers

    @property
    def text(self) -> str:
        """The document that it ends."""
        return self.prompt + self.response


class Unlearned(NamedTuple):
    """Characters of a document that are an answer of weight 0."""

    start: int
    end: int
    number: int  # learned answers before it


class Tail(NamedTuple):
    """What stands at the border of the last answer, where that is known without a look."""

    special: str  # the prompt's end, from its last control token on
    behind: int  # control tokens in the answer


@dataclass
class Draft:
    """A document: its last answer, and earlier ones that stand in its text."""

    last: Learned
    earlier: list[Learned] = field(default_factory=list)  # in order
    unlearned: list[Unlearned] = field(default_factory=list)
    alone: "Callable[[Learned], Draft] | None" = None  # a document that ends with an earlier answer; None: running text
    hidden: bool = False  # control tokens are hidden in it
    tail: Tail | None = None
    images: Sequence[Measured] = ()  # of the row, in order; those of the prompt are the first

    def takes(self, answer: Learned) -> bool:
        """Whether an earlier answer and all before it begin this document."""
        behind = self.earlier[0] if self.earlier else self.last
        return len(answer.prompt) + len(answer.response) <= len(behind.prompt) and self.last.prompt.startswith(
            answer.text
        )


@dataclass
class Chat:
    """A conversation whose answers are known."""

    tools: list[dict[str, Any]] | None
    answers: list[Answer]
    weights: list[float | None]  # of each answer: None where it is context
    render: Render
    control: ControlTokens
    hidden: bool
    images: Sequence[Measured] = ()

    def drafts(self) -> list[Draft]:
        """Every learned answer in a document."""
        learned = [place for place, weight in enumerate(self.weights) if weight]
        drafts: list[Draft] = []
        for number, place in reversed([*enumerate(learned)]):
            answer = self._learned(place, number)
            home = next((draft for draft in drafts if draft.takes(answer)), None)
            if home is None:
                drafts.append(self.draft(answer))
            else:
                home.earlier.insert(0, answer)
        return drafts

    def draft(self, last: Learned) -> Draft:
        """A document that ends with an answer."""
        text = last.text
        check_context(self.answers[last.place].upto, self.tools, text)
        unlearned, number = [], 0
        for answer, weight in zip(self.answers[: last.place], self.weights, strict=False):
            if weight == 0:
                unlearned.append(Unlearned(*self._place(answer, last.prompt), number))
            number += bool(weight)
        return Draft(last, unlearned=unlearned, alone=self.draft, hidden=self.hidden, images=self.images)

    def _learned(self, place: int, number: int) -> Learned:
        answer = self.answers[place]
        if not any(text.strip() and self.control.removed(text).strip() for _, text in answer.words):
            raise BadRow(f"messages[{answer.last}] is the assistant's and says nothing: nothing to learn.")
        message = answer.upto[-1]
        if message.get("tool_responses"):  # a template that does not know them has no place for an answer behind them
            check_context(answer.before, None, self.render(answer.before, True))
        rendered = split(answer.before, answer.upto, self.render, self.control)
        check_answer(answer.words, rendered.response)
        if message.get("tool_responses") and not stands(message.get("reasoning_content", ""), rendered.whole):
            raise BadRow(
                f"the chat template leaves out messages[{answer.last}].reasoning_content, a thought before the tools' "
                "responses: take it out of the row, or change the template."
            )
        weight = self.weights[place]
        assert weight  # only learned answers come here
        return Learned(rendered.prompt, self._without_separator(rendered.response), weight, number, place)

    def _without_separator(self, response: str) -> str:
        ended = response.rstrip()
        return ended if self.control.ends(ended) else response

    def _place(self, answer: Answer, prompt: str) -> tuple[int, int]:
        """Where an answer stands in a later one's prompt, with its thoughts or without."""
        for thoughts in (True, False):
            before, upto = (each if thoughts else _without_thoughts(each) for each in (answer.before, answer.upto))
            rendered = split(before, upto, self.render, self.control)
            whole = self._without_separator(rendered.whole)
            if prompt.startswith(whole):
                return len(rendered.whole) - len(rendered.response), len(whole)
        raise BadRow(
            f"messages[{answer.last}] has weight 0, but the chat template writes it differently once later turns are "
            "there, so it cannot be left out of the loss: take it out of the row, or end the row before it."
        )


def _without_thoughts(messages: list[Message]) -> list[Message]:
    thoughts = ("reasoning_content", "reasoning", "thinking")
    return [{key: value for key, value in message.items() if key not in thoughts} for message in messages]
