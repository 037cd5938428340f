"""Renderings of ordinary conversations put together from the template's own pieces, without running it for each.

A template is a program, and takes longer than the tokenizer. But of most rows, whose messages have a role and a content
and nothing else, it only copies the contents between pieces that depend on the roles. So it is run once for each
sequence of roles, with marks for contents, and watched: any filter, method or index that looks into a mark gives the
template up, as do marks of another length that change a piece. What it compares, searches or splits with are string
constants of its own: a content that holds one of them is rendered by the template itself, as is one with white space at
an end, which templates trim.
"""

import re
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from jinja2 import Template, nodes

from ds_dgemma.data.messages import Message

MARK = "\ue000"  # a private-use character; its number and END follow
END = "\ue001"
LENGTHS = (1, 5_000)  # of marks; a template that asks for a length sees the difference
SAFE_FILTERS = frozenset(("trim", "length", "count", "string", "safe", "default", "d"))
NO_MACROS = frozenset(("raise_exception", "strftime_now", "namespace", "dict", "range"))
SAFE_METHODS = frozenset(("split", "strip", "lstrip", "rstrip", "startswith", "endswith"))


class _LooksInside(Exception):
    """The template does with a content what a mark cannot stand for."""


class Skeletons:
    """The pieces of a template's renderings by the roles of a conversation."""

    def __init__(self, template: Template, source: str, variables: dict[str, Any]):
        self._template, self._source, self._variables = template, source, variables
        self._whole, within = _operands(template.environment.parse(source))
        self._within = re.compile("|".join(map(re.escape, sorted(within - {""} | {MARK, END}))))
        self._known: dict[tuple[Any, ...], list[str] | None] = {}

    def render(self, messages: list[Message], add_generation_prompt: bool) -> str | None:
        """What the template writes; None where only the template itself can tell."""
        for message in messages:
            content = message["content"]
            if len(message) != 2 or not content or content[0].isspace() or content[-1].isspace():
                return None
            if content in self._whole or self._within.search(content):
                return None
        key = (add_generation_prompt, *[message["role"] for message in messages])
        if key not in self._known:
            self._known[key] = self._pieces(messages, add_generation_prompt)
        pieces = self._known[key]
        return None if pieces is None else "".join([messages[p]["content"] if type(p) is int else p for p in pieces])

    def _pieces(self, messages: list[Message], add_generation_prompt: bool) -> list[Any] | None:
        """Text and numbers of contents, alternating; None where the template looks into contents."""
        found = []
        for length in LENGTHS:
            marked = [{**message, "content": f"{MARK * length}{n}{END}"} for n, message in enumerate(messages)]
            own = {**self._variables, "messages": marked, "add_generation_prompt": add_generation_prompt}
            try:
                rendered = self._watched.render(own)
            except Exception:  # the template itself will say what is wrong
                return None
            parts = re.split(f"{MARK}{{{length}}}(\\d+){END}", rendered)
            if any(MARK in part or END in part for part in parts):
                return None
            found.append([int(part) if place % 2 else part for place, part in enumerate(parts)])
        return found[0] if found[0] == found[1] else None

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
