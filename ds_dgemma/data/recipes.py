"""Documents of ordinary conversations put together from the template's own pieces, without running it for each.

A template is a program, and takes longer than the tokenizer. But of most rows, whose messages have a role and a content
and nothing else, it only copies the contents between pieces that depend on the roles. So for each sequence of roles the
documents are made once, with marks for contents, and the template is watched: a filter, method or index that looks into
a mark gives the roles up, as do marks of another length that change a piece. What it compares, searches or splits with
are string constants of its own: a content that holds one of them goes the long way, as does one with white space at an
end, which templates trim, or with a control token.
"""

import re
from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import Template, nodes

from ds_dgemma.data.control_tokens import ControlTokens
from ds_dgemma.data.drafts import Draft, Learned, Tail, Unlearned
from ds_dgemma.data.formats import BadRow, Conversation
from ds_dgemma.data.messages import Message
from ds_dgemma.data.rendering import Render

MARK = "\ue000"  # a private-use character; its number and END follow
END = "\ue001"
LENGTHS = (1, 5_000)  # of marks; a template that asks for a length sees the difference
KNOWN = 1000  # recipes that are remembered
SAFE_FILTERS = frozenset(("trim", "length", "count", "string", "safe", "default", "d"))
NO_MACROS = frozenset(("raise_exception", "strftime_now", "namespace", "dict", "range"))
SAFE_METHODS = frozenset(("split", "strip", "lstrip", "rstrip", "startswith", "endswith"))

Pieces = list[Any]  # texts, and numbers of contents
Long = Callable[[Conversation, Render | None], list[Draft]]


class _LooksInside(Exception):
    """The template does with a content what a mark cannot stand for."""


class _Answer(NamedTuple):
    """An answer, as pieces."""

    prompt: Pieces
    response: Pieces
    weight: float
    number: int
    place: int

    def fill(self, contents: list[str]) -> Learned:
        return Learned(_join(self.prompt, contents), _join(self.response, contents), *self[2:])


class _Recipe(NamedTuple):
    """A document, as pieces."""

    last: _Answer
    earlier: list[_Answer]
    unlearned: list[tuple[Pieces, Pieces, int]]  # what stands before its begin and its end
    tail: Tail | None


class Recipes:
    """The documents of ordinary conversations, by their roles and weights."""

    def __init__(
        self,
        template: Template,
        source: str,
        variables: dict[str, Any],
        control: ControlTokens,
        image_tokens: Collection[str],
        make: Long,
    ):
        """`make`: the documents of a conversation by a rendering, or by the template's own."""
        self._template, self._source, self._variables = template, source, variables
        self._control, self._make = control, make
        self._whole, within = _operands(template.environment.parse(source))
        self._within = re.compile("|".join(map(re.escape, sorted({*within, *image_tokens} - {""} | {MARK, END}))))
        self._known: dict[tuple[Any, ...], list[_Recipe] | None] = {}

    def drafts(self, data: Conversation) -> list[Draft] | None:
        """What the long way makes of a conversation; None where only that can tell."""
        contents = []
        for message in data.messages:
            content = message["content"]
            if len(message) != 2 or not content or content[0].isspace() or content[-1].isspace():
                return None
            if content in self._whole:
                return None
            contents.append(content)
        together = "\0".join(contents)
        if self._within.search(together) or self._control.is_in(together):
            return None
        key = (*[message["role"] for message in data.messages], *data.weights)
        if key not in self._known:
            if len(self._known) >= KNOWN:
                self._known.clear()
            self._known[key] = self._recipes(data)
        recipes = self._known[key]
        if recipes is None:
            return None

        def alone(answer: Learned) -> Draft:
            long = self._make(data, None)
            every = [(draft, learned) for draft in long for learned in (draft.last, *draft.earlier)]
            draft, learned = next((draft, learned) for draft, learned in every if learned.place == answer.place)
            assert draft.alone
            return draft if learned is draft.last else draft.alone(learned)

        return [
            Draft(
                recipe.last.fill(contents),
                [answer.fill(contents) for answer in recipe.earlier],
                [
                    Unlearned(len(_join(start, contents)), len(_join(end, contents)), number)
                    for start, end, number in recipe.unlearned
                ],
                alone,
                tail=recipe.tail,
            )
            for recipe in recipes
        ]

    def _recipes(self, data: Conversation) -> list[_Recipe] | None:
        """None where the template looks into contents."""
        found = []
        for length in LENGTHS:
            contents = [f"{MARK * length}{n}{END}" for n in range(len(data.messages))]
            messages = [{**message, "content": own} for message, own in zip(data.messages, contents, strict=True)]
            try:
                drafts = self._make(Conversation(messages, data.weights), self._render)
            except (BadRow, _LooksInside):  # the long way will say what is wrong
                return None
            cut = re.compile(f"{MARK}{{{length}}}(\\d+){END}")
            try:
                found.append([self._recipe(draft, cut) for draft in drafts])
            except _LooksInside:
                return None
        return found[0] if found[0] == found[1] else None

    def _recipe(self, draft: Draft, cut: re.Pattern[str]) -> _Recipe:
        def answer(learned: Learned) -> _Answer:
            return _Answer(_cut(learned.prompt, cut), _cut(learned.response, cut), *learned[2:])

        text, last = draft.last.text, answer(draft.last)
        unlearned = [(_cut(text[:start], cut), _cut(text[:end], cut), number) for start, end, number in draft.unlearned]
        return _Recipe(last, [answer(learned) for learned in draft.earlier], unlearned, self._tail(draft.last))

    def _tail(self, last: Learned) -> Tail | None:
        *_, special = [None, *self._control.within(last.prompt)]
        if special is None or MARK in (end := last.prompt[special[0] :]):
            return None
        return Tail(end, sum(1 for _ in self._control.within(last.response)))

    def _render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        own = {**self._variables, "messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return self._watched.render(own)
        except Exception as error:
            raise _LooksInside from error

    @cached_property
    def _watched(self) -> Template:
        """The template in an environment that notices what is done with marks."""
        environment: Any = self._template.environment.overlay()
        environment.filters = {name: _watch(name, use) for name, use in environment.filters.items()}
        call, getitem = environment.call, environment.getitem

        def watched_call(context: Any, function: Any, *args: Any, **more: Any) -> Any:
            owner = getattr(function, "__self__", None)
            if _marked(owner) and (function.__name__ not in SAFE_METHODS or not args):
                raise _LooksInside
            return call(context, function, *args, **more)

        def watched_getitem(thing: Any, key: Any) -> Any:
            if _marked(thing):
                raise _LooksInside
            return getitem(thing, key)

        environment.call, environment.getitem = watched_call, watched_getitem
        return environment.from_string(self._source)


def _cut(text: str, cut: re.Pattern[str]) -> Pieces:
    """Texts and numbers of contents, alternating."""
    parts = cut.split(text)
    if any(MARK in part or END in part for part in parts):
        raise _LooksInside
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


def _join(pieces: Pieces, contents: list[str]) -> str:
    return "".join([contents[piece] if type(piece) is int else piece for piece in pieces])


def _marked(value: Any) -> bool:
    return isinstance(value, str) and MARK in value


def _watch(name: str, use: Callable[..., Any]) -> Callable[..., Any]:
    if name in SAFE_FILTERS:
        return use

    def watched(*args: Any, **more: Any) -> Any:
        if any(map(_marked, args)):
            raise _LooksInside
        return use(*args, **more)

    for flag in ("jinja_pass_arg", "jinja_async_variant"):
        if hasattr(use, flag):
            setattr(watched, flag, getattr(use, flag))
    return watched


def _operands(template: nodes.Template) -> tuple[set[str], set[str]]:
    """String constants that a content is compared with as a whole, and those that are looked for in it."""
    whole, within = set(), set()
    for compared in template.find_all(nodes.Compare):
        for operand in compared.ops:
            listed = isinstance(operand.expr, nodes.List | nodes.Tuple)
            only_equal = operand.op in ("eq", "ne") or listed
            (whole if only_equal else within).update(_strings(compared.expr, operand.expr))
    for used in template.find_all((nodes.Filter, nodes.Test)):
        (within if used.name == "trim" else whole).update(_strings(*used.args))
    for called in template.find_all(nodes.Call):
        method = called.node.attr if isinstance(called.node, nodes.Getattr) else None
        name = called.node.name if isinstance(called.node, nodes.Name) else None
        if method in SAFE_METHODS or (method is None and name not in NO_MACROS):
            within.update(_strings(*called.args, *(keyword.value for keyword in called.kwargs)))
    return whole, within


def _strings(*expressions: nodes.Node) -> Iterator[str]:
    """String constants in expressions, keys of mappings left out."""
    for expression in expressions:
        if isinstance(expression, nodes.Const):
            if isinstance(expression.value, str):
                yield expression.value
        elif not isinstance(expression, nodes.Getitem | nodes.Getattr | nodes.Call):
            yield from _strings(*expression.iter_child_nodes(exclude=("ctx",)))
