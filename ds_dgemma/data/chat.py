"""A row as tokens: its conversation in one sequence with several learned spans.

An answer is an assistant's message, or a run of neighbouring ones that the template joins into one turn. How it is
rendered is told in `rendering.py`. Three rules keep training and generation the same text:

- *Every turn in one sweep.* Documents are made from the last answer backwards. An earlier answer becomes a span of a
  later one's document where its prompt and response begin that document, at token borders; where the template writes
  it differently once later turns are there, it gets a document of its own.
- *Tokens.* A prompt's tokens are those that it has alone, as in generation; the response is the rest of prompt +
  response tokenized together, or, where a token would straddle the border, the response tokenized alone.
- *Where an answer ends.* White space after its last special token (`<turn|>\\n`) separates turns and is never
  generated, so it is not learned. A template that ends its turns with plain text keeps all of it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from ds_dgemma.data.batch import Image, Span
from ds_dgemma.data.control_tokens import control_tokens_of
from ds_dgemma.data.drafter import Drafter
from ds_dgemma.data.drafts import Draft
from ds_dgemma.data.encoding import Encoder, TokenizedText
from ds_dgemma.data.formats import BadRow, Conversation, Message, Text
from ds_dgemma.data.image_files import ImageFiles, Measured, place_images
from ds_dgemma.data.left_out import check_context
from ds_dgemma.data.pictures import origins
from ds_dgemma.data.rendering import ChatTemplate, as_templates_read


class Document(NamedTuple):
    """A sequence with learned spans; a row has one, or more where the template rewrites earlier turns."""

    row: int
    ids: list[int]  # ends with the last learned span
    spans: tuple[Span, ...]  # in order; the last has a weight. One of weight 0 is an answer that is not to be learned
    scored_from: int  # tokens before it are AR targets in another document of the row
    starts_anywhere: bool  # running text
    images: tuple[Image, ...] = ()


class _Tokens(NamedTuple):
    """A draft as tokens."""

    ids: list[int]
    start: int  # of its last answer
    text: TokenizedText  # to find earlier borders in


def tokenize_rows(
    rows: Sequence[tuple[int, Conversation | Text]], drafter: Drafter
) -> list[Document | tuple[int, BadRow]]:
    """Render and tokenize rows: the documents of a row, the one with its last answer first, or what is wrong with it.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    documents: list[list[Document]] = [[] for _ in rows]
    bad: dict[int, BadRow] = {}
    drafts: list[tuple[int, Draft]] = []
    for place, (_, data) in enumerate(rows):
        try:
            drafts += [(place, draft) for draft in drafter.drafts(data)]
        except BadRow as problem:
            bad[place] = problem
    writer = _Writer(drafter.tokenizer, drafter.image_token)
    while drafts:  # once, and again for answers whose borders are no token borders
        alone = []
        for (place, draft), tokens in zip(drafts, writer.encode([draft for _, draft in drafts]), strict=True):
            try:
                document, left = writer.document(rows[place][0], draft, tokens, documents[place])
                documents[place].append(document)
                alone += [(place, each) for each in left]
            except BadRow as problem:
                bad.setdefault(place, problem)
        drafts = alone
    return [
        told
        for place, of_row in enumerate(documents)
        for told in ([(rows[place][0], bad[place])] if place in bad else of_row)
    ]


def prompt_text(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerFast,
    tools: list[dict[str, Any]] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    images: ImageFiles | None = None,
) -> tuple[str, list[Measured]]:
    """What `generate` is given to answer `messages`, and their images.

    Raises:
        BadRow: the template leaves out a part of them or of the tools, or an image cannot be read.
    """
    render = ChatTemplate(tokenizer, chat_template_kwargs or {}).for_row(tools, {})
    found = [images.find(origin) for origin in origins(messages)] if images else []
    if images and found:
        render = images.rendering(render, found)
    text = render(as_templates_read(messages), True)
    check_context(messages, tools, text)
    return text, found


class _Writer:
    """Drafts to documents."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, image_token: str | None):
        self._image_id: Any = image_token and tokenizer.convert_tokens_to_ids(image_token)
        self._encoder = Encoder(tokenizer, control_tokens_of(tokenizer))
        bos: Any = tokenizer.bos_token_id
        self._bos: list[int] = [] if bos is None else [bos]
        self._unknown, self._unknown_id = str(tokenizer.unk_token or ""), tokenizer.unk_token_id

    def encode(self, drafts: list[Draft]) -> list[_Tokens]:
        """Tokenize by the module's second rule."""
        texts = self._encoder.encode([(draft.last.text, draft.hidden) for draft in drafts])
        borders = [
            self._encoder.border(text, len(draft.last.prompt), draft.tail)
            for draft, text in zip(drafts, texts, strict=True)
        ]
        made = [_Tokens(text.ids, border.tokens or 0, text) for text, border in zip(texts, borders, strict=True)]
        unsure = [place for place, border in enumerate(borders) if not border.sure]
        pieces = [
            (piece, drafts[place].hidden)
            for place in unsure
            for piece in (drafts[place].last.prompt, drafts[place].last.response)
        ]
        apart = iter(self._encoder.encode(pieces) if pieces else ())
        for place, prompt, response in zip(unsure, apart, apart, strict=True):
            start = len(prompt.ids)
            if texts[place].ids[:start] == prompt.ids:
                made[place] = _Tokens(texts[place].ids, start, texts[place])
            else:
                made[place] = _Tokens(prompt.ids + response.ids, start, prompt)
        return made

    def _border(self, text: TokenizedText, prompt: str, hidden: bool) -> int | None:
        """How many tokens a prompt has at the begin of a text; None where they are not those that it has alone."""
        border = self._encoder.border(text, len(prompt))
        if border.sure or border.tokens is None:
            return border.tokens
        (alone,) = self._encoder.encode([(prompt, hidden)])
        return border.tokens if text.ids[: border.tokens] == alone.ids else None

    def document(self, row: int, draft: Draft, tokens: _Tokens, others: list[Document]) -> tuple[Document, list[Draft]]:
        """The document of a draft, and the drafts of earlier answers that have no token borders in it.

        Raises:
            BadRow: a part of the text has no token, or an answer of weight 0 no borders.
        """
        if self._unknown_id is not None and self._unknown_id in tokens.ids and self._unknown not in draft.last.text:
            raise BadRow(
                "the tokenizer has no token for a part of this row, which would become "
                f"{self._unknown}. Change the text, the chat template or the tokenizer."
            )
        last = draft.last
        if draft.alone is None:
            ids = self._bos + tokens.ids
            return Document(row, ids, (Span(len(self._bos), len(ids), last.weight, last.number),), 1, True), []
        spans, alone = [Span(tokens.start, len(tokens.ids), last.weight, last.number)], []
        for answer in draft.earlier:
            start = self._border(tokens.text, answer.prompt, draft.hidden)
            end = tokens.text.tokens_before(len(answer.prompt) + len(answer.response))
            if start is None or end is None:
                alone.append(draft.alone(answer))
            else:
                spans.append(Span(start, end, answer.weight, answer.number))
        for part in draft.unlearned:
            start, end = tokens.text.tokens_before(part.start), tokens.text.tokens_before(part.end)
            if start is None or end is None:
                raise BadRow(
                    "an answer has weight 0, but a token holds both a part of it and of the text beside it, so it "
                    "cannot be left out of the loss: take it out of the row, or change the template."
                )
            spans.append(Span(start, end, 0.0, part.number))
        spans.sort()
        scored_from = 1
        if others:
            shared = max(_shared(tokens.ids, other.ids) for other in others)
            scored_from = max(min(shared, next(span.start for span in spans if span.weight)), 1)
        images = place_images(tokens.ids, self._image_id, draft.images) if draft.images else ()
        return Document(row, tokens.ids, tuple(spans), scored_from, False, images), alone


def _shared(ids: list[int], others: list[int]) -> int:
    """How many leading tokens are the same."""
    return next(
        (place for place, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others))
    )
