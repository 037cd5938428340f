"""Texts as tokens, and how many tokens stand before a character.

Where a token border lies at a character, no merge crossed it, and what stands before is tokenized as it is alone. Some
tokenizers split text by what comes next, so the tokens from the last special token to the border are compared with
those of that piece alone.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from ds_dgemma.data.control_tokens import MARKS, ControlTokens
from ds_dgemma.data.drafts import Tail

REACH = 64  # characters back from a border to the special token before it


class TokenizedText:
    """The tokens of a text that was encoded in one or several pieces."""

    __slots__ = ("_pieces", "ids", "text")

    def __init__(self, text: str, pieces: Sequence[tuple[int, list[int], Encoding | None]]):
        self.text = text
        self._pieces = pieces  # first character, tokens, and the encoding unless it is a hidden control token
        self.ids = pieces[0][1] if len(pieces) == 1 else [token for _, ids, _ in pieces for token in ids]

    @property
    def is_cut(self) -> bool:
        """Whether it was encoded in several pieces."""
        return len(self._pieces) > 1

    def token_at(self, char: int) -> int | None:
        """The token that a character of a text in one piece belongs to, where that is known."""
        encoding = self._pieces[0][2]
        return encoding.char_to_token(char) if encoding else None

    def tokens_before(self, char: int) -> int | None:
        """How many tokens lie before a character; None where a token straddles its begin."""
        if char == len(self.text):
            return len(self.ids)
        begin, before, encoding = 0, 0, self._pieces[0][2]
        if len(self._pieces) > 1:
            place = bisect_right(self._pieces, char, key=lambda piece: piece[0]) - 1
            begin, _, encoding = self._pieces[place]
            before = sum(len(ids) for _, ids, _ in self._pieces[:place])
        if char == begin:
            return before
        token = encoding.char_to_token(char - begin) if encoding else None
        if encoding is None or token is None:
            return None
        first, _ = encoding.token_to_chars(token) or (None, None)
        return before + token if first == char - begin else None


class Border(NamedTuple):
    """Where a prompt ends."""

    tokens: int | None  # before it; None where a token straddles it
    sure: bool  # they are those that the prompt has alone


class Encoder:
    """The tokenizer without any template, padding or cut."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, control: ControlTokens):
        self._tokenizer = tokenizer
        self._backend: Any = tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = False
        self._control = control
        self._alone: dict[str, list[int]] = {}

    def encode(self, texts: Sequence[tuple[str, bool]]) -> list[TokenizedText]:
        """Encode texts, each with whether it has hidden control tokens, in one call of the tokenizer, which has
        threads of its own.
        """
        if not any(hidden for _, hidden in texts):
            encodings = self._backend.encode_batch([text for text, _ in texts], add_special_tokens=False)
            return [
                TokenizedText(text, ((0, encoding.ids, encoding),))
                for (text, _), encoding in zip(texts, encodings, strict=True)
            ]
        cut = [_pieces(text) if hidden else [(0, text, False)] for text, hidden in texts]
        plain = [piece for pieces in cut for _, piece, hidden in pieces if not hidden]
        encodings = iter(self._backend.encode_batch(plain, add_special_tokens=False))
        return [self._joined(text, pieces, encodings) for (text, _), pieces in zip(texts, cut, strict=True)]

    def border(self, text: TokenizedText, char: int, tail: Tail | None = None) -> Border:
        """The token border where a prompt ends, at a character; `tail`: what is known of it."""
        if char == 0:
            return Border(0, True)
        end = self._behind_special(text, char, tail)
        return Border(text.tokens_before(char), False) if end is None else Border(end, True)

    def _behind_special(self, text: TokenizedText, char: int, known: Tail | None) -> int | None:
        """How many tokens lie before a character, told by the special token before it; None where there is none near,
        or its piece has other tokens than alone. Special tokens are cut out of a text first, so they can be counted.
        """
        if text.is_cut:
            return None
        if known is None:
            begin = max(char - REACH, 0)
            *_, last = [None, *self._control.within(text.text[begin:char])]
            if last is None:
                return None
            known = Tail(text.text[begin + last[0] : char], sum(1 for _ in self._control.within(text.text[char:])))
        alone = self._alone.get(known.special)
        if alone is None:
            alone = self._alone[known.special] = self._backend.encode(known.special, add_special_tokens=False).ids
        if (begun := text.token_at(char)) is not None and text.ids[max(begun - len(alone), 0) : begun] == alone:
            return begun
        place, behind, special = len(text.ids), known.behind, self._control.ids
        while behind >= 0:
            place -= 1
            if place < 0:
                return None
            behind -= text.ids[place] in special
        end = place + len(alone)
        return end if text.ids[place:end] == alone else None

    def _joined(self, text: str, pieces, encodings) -> TokenizedText:
        joined = []
        for begin, piece, hidden in pieces:
            encoding = None if hidden else next(encodings)
            joined.append((begin, self._control.characters(piece) if encoding is None else encoding.ids, encoding))
        return TokenizedText(text, joined)


def _pieces(text: str) -> list[tuple[int, str, bool]]:
    """Cut a text at its hidden control tokens: first character, piece, whether it is one."""
    pieces, behind = [], 0
    for match in MARKS.finditer(text):
        if behind < match.start():
            pieces.append((behind, text[behind : match.start()], False))
        pieces.append((match.start(), match.group(), True))
        behind = match.end()
    return [*pieces, (behind, text[behind:], False)] if behind < len(text) or not pieces else pieces
