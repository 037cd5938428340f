"""Control tokens in what a row brings: found, or hidden so that they are encoded as plain characters.

A control token is a special token of the tokenizer, such as the end of a turn. Only the chat template writes them; a
text that holds one would end an answer or open a turn. A hidden one is a single private-use character while the
template renders, so no template can cut it, and no tokenizer can take it for what it stands for.
"""

import re
from collections.abc import Collection, Iterator
from functools import lru_cache
from typing import Any, Literal

from transformers import PreTrainedTokenizerFast

from ds_dgemma.data.formats import BadRow

ControlTokenPolicy = Literal["error", "text", "allow"]

MESSAGES, ROLE = "messages", "role"  # a message's is a word of the template's, which may well be a token of its own
ROLE_OF_A_MESSAGE = re.compile(r"messages\[\d+\]")
FIRST_MARK = 0xF0000  # private use: this and the number of the token
MARKS = re.compile("[\U000f0000-\U0010ffff]")
THOUGHT = re.compile("think|thought|channel|reason")


class ControlTokens:
    """The special tokens of a tokenizer, as they stand in a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        added: dict[int, Any] = tokenizer.added_tokens_decoder
        self._backend: Any = tokenizer.backend_tokenizer
        self._spelled: dict[str, list[int]] = {}
        self.ids = {number for number, token in added.items() if token.special}
        names = {token.content for token in added.values() if token.special} | {str(tokenizer.unk_token or "")}
        self.names: tuple[str, ...] = tuple(
            sorted(names - {""}, key=lambda name: (-len(name), name))
        )  # a longer one wins
        self.added: tuple[str, ...] = tuple(token.content for token in added.values() if not token.content.isspace())
        self._marks = {name: chr(FIRST_MARK + number) for number, name in enumerate(self.names)}
        self._lengths = sorted({len(name) for name in self.names}, reverse=True)
        firsts = "".join(sorted({re.escape(name[0]) for name in self.names}))
        self._first = re.compile(f"[{firsts}]" if firsts else "(?!)")

    def within(self, text: str) -> Iterator[tuple[int, str]]:
        """Each control token in a text, and where it begins."""
        behind = 0
        for match in self._first.finditer(text):  # thousands of names: a look-up a length is faster than a pattern
            start = match.start()
            if start < behind:
                continue
            name = next(
                (text[start : start + n] for n in self._lengths if text[start : start + n] in self._marks), None
            )
            if name is not None:
                behind = start + len(name)
                yield start, name

    def is_in(self, text: str) -> bool:
        """Whether a text holds a control token."""
        return self._first.search(text) is not None and next(self.within(text), None) is not None

    def ends(self, text: str) -> bool:
        """Whether a text ends with a control token."""
        return any(text[-length:] in self._marks for length in self._lengths)

    def removed(self, text: str) -> str:
        """A text without its control tokens."""
        return self._replaced(text, {})

    def hidden(self, value: Any) -> Any:
        """The same value, in all whose strings a private-use character stands for each control token."""
        if isinstance(value, str):
            return self._replaced(value, self._marks)
        if isinstance(value, dict):
            return {self.hidden(key): self.hidden(item) for key, item in value.items()}
        return [self.hidden(item) for item in value] if isinstance(value, list) else value

    def mark_of(self, name: str) -> str:
        """The private-use character that stands for a control token."""
        return self._marks[name]

    def characters(self, mark: str) -> list[int]:
        """The tokens of the characters of the control token that a private-use character stands for."""
        if mark not in self._spelled:
            name = self.names[ord(mark) - FIRST_MARK]
            self._backend.encode_special_tokens = True
            try:
                ids = self._backend.encode(name, add_special_tokens=False).ids
            finally:
                self._backend.encode_special_tokens = False
            if self.ids.intersection(ids):
                raise BadRow(f"this tokenizer cannot write {name} as characters: take it out of the text.")
            self._spelled[mark] = ids
        return self._spelled[mark]

    def _replaced(self, text: str, by: dict[str, str]) -> str:
        pieces, behind = [], 0
        for start, name in self.within(text):
            pieces += [text[behind:start], by.get(name, "")]
            behind = start + len(name)
        return "".join([*pieces, text[behind:]])


def control_tokens_of(tokenizer: PreTrainedTokenizerFast) -> ControlTokens:
    """The control tokens of a tokenizer, collected once."""
    return _collected(tokenizer, len(tokenizer))


@lru_cache(maxsize=4)
def _collected(tokenizer: PreTrainedTokenizerFast, size: int) -> ControlTokens:
    return ControlTokens(tokenizer)


def checked(
    brought: dict[str, Any], control: ControlTokens, policy: ControlTokenPolicy, image_tokens: Collection[str]
) -> dict[str, Any]:
    """What a row brings, by name, with control tokens as `policy` wants them.

    Raises:
        BadRow: a text holds a control token that `policy` does not take, or what stands for an image.
    """
    strings: list[str] = []
    for name, value in brought.items():
        _collect(value, strings, name == MESSAGES)
    together = "\0".join(strings)
    for token in image_tokens:
        if token in together:
            where = next(name for name, text in _named(brought) if token in text)
            raise BadRow(
                f"{where} holds {token}, which stands for an image: take it out of the text. "
                "An image is a part of the content, {type: image, path: ...}."
            )
    if policy == "allow" or not control.is_in(together):
        return brought
    if policy == "error":
        raise _refusal(brought, control)
    if MARKS.search(together):
        raise BadRow(
            "holds a control token and a character of the private-use planes 15 and 16, so data.control_tokens: text "
            "cannot tell them apart. Take one of them out."
        )
    hidden = control.hidden({name: value for name, value in brought.items() if name != MESSAGES})
    for message in brought.get(MESSAGES, ()):
        role = {ROLE: message[ROLE]}
        hidden.setdefault(MESSAGES, []).append({**control.hidden(message), **role})
    for _, name in control.within(together):
        control.characters(control.mark_of(name))
    return hidden


def _refusal(brought: dict[str, Any], control: ControlTokens) -> BadRow:
    where, token = next((name, token) for name, text in _named(brought) for _, token in control.within(text))
    thought = " A thought goes into the message's reasoning_content." if THOUGHT.search(token) else ""
    return BadRow(
        f"{where} holds {token}, a control token of this tokenizer: the model would read it as such, not as text."
        f"{thought} Take it out, or set data.control_tokens: text (encode its characters) or allow (let it be one)."
    )


def _collect(value: Any, strings: list[str], are_messages: bool = False) -> None:
    if isinstance(value, str):
        strings.append(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            strings.append(key)
            if isinstance(item, str):
                strings.append(item)
            elif item is not None:
                _collect(item, strings)
    elif isinstance(value, list):
        for item in value:
            _collect({key: part for key, part in item.items() if key != ROLE} if are_messages else item, strings)


def _named(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key == ROLE and ROLE_OF_A_MESSAGE.fullmatch(name):
                continue
            yield f"a key of {name}" if name else "a key", key
            yield from _named(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _named(item, f"{name}[{number}]")
