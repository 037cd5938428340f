"""The settings in words, read from the pydantic models: errors and the reference can't fall behind them.

A key is a path in the schema, `("optimizer", "lr")`, and is shown to people with dots.
"""

import difflib
import json
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ds_dgemma.config.run import RunConfig
from ds_dgemma.config.section import section_of
from ds_dgemma.config.yaml import Key


def dotted(key: Key) -> str:
    """A key as people write it."""
    return ".".join(key)


def sections(section: type[BaseModel] = RunConfig, above: Key = ()) -> Iterator[tuple[Key, type[BaseModel]]]:
    """Every section of the schema with its key, outer ones first."""
    yield above, section
    for name, field in section.model_fields.items():
        if below := section_of(field):
            yield from sections(below, (*above, name))


def nearest(key: Key) -> str:
    """Advice for an unknown key: a close name beside it, the same name elsewhere, or what is known there."""
    known = {(*above, name) for above, section in sections() for name in section.model_fields}
    around = tuple(part for part in key[:-1] if not part.isdigit())  # without places in a list
    beside = sorted(other[-1] for other in known if other[:-1] == around)
    if len(key) == 1 and tuple(key[0].split(".")) in known:
        section, _, name = key[0].rpartition(".")
        return f" In a file, write {name}: indented below {section}:."
    if close := difflib.get_close_matches(key[-1], beside, n=1):
        return f" Did you mean {dotted((*key[:-1], close[0]))}?"
    same = sorted(dotted(other) for other in known if other[-1] == key[-1])
    if found := same or difflib.get_close_matches(dotted((*around, key[-1])), map(dotted, known), n=1, cutoff=0.75):
        return f" Did you mean {' or '.join(found)}?"
    return f" Known here: {', '.join(beside)}." if beside else ""


def expected(field: FieldInfo) -> str:
    """A field's type and bounds in words: "a number > 0", "bf16 or fp32", "a section with dir"."""
    return _in_words(field.annotation) + _bounds_in_words(field.metadata)


def _bounds_in_words(metadata: Iterable[Any]) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [f"{sign} {getattr(one, name)}" for one in metadata for name, sign in signs.items() if hasattr(one, name)]
    return f" {' and '.join(bounds)}" if bounds else ""


def _in_words(annotation: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    origin, members = get_origin(annotation), get_args(annotation)
    if word := {**words, dict: "a mapping"}.get(origin or annotation):
        return word
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields
        return f"a section with {', '.join([n for n, field in fields.items() if field.is_required()] or fields)}"
    if origin is Annotated:
        inside = members[1].metadata if isinstance(members[1], FieldInfo) else members[1:]
        return _in_words(members[0]) + _bounds_in_words(inside)
    if origin is Literal:
        *most, last = map(str, members)
        return f"{', '.join(most)} or {last}" if most else last
    if origin in (Union, types.UnionType):
        return " or ".join("null" if member is type(None) else _in_words(member) for member in members)
    if origin is tuple:
        inner = _in_words(members[0]).removeprefix("a ").replace("section", "sections", 1)
        return f"a list of {inner}" if members[-1] is Ellipsis else f"a list of {len(members)} {inner}s"
    raise TypeError(f"no words for a setting of type {annotation}")


def meaning(field: FieldInfo) -> str:
    """A field's description; a section's is the first sentence of its docstring."""
    section = section_of(field)
    return field.description or (_purpose(section).rstrip(".") if section else "")


def show(value: Any) -> str:
    """A value for one line of a message; of a long one, both ends."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:25]}...{text[-32:]}"


def reference_markdown() -> str:
    """The config reference, `ds_configs/reference.md`: one table for every section."""
    parts = ["# The run config\n\nMade from `ds_dgemma/config` by `ds-dgemma config-reference`."]
    seen = set()
    for above, section in sections():
        rows = []
        for name, field in section.model_fields.items():
            if section_of(field) is not field.annotation:  # a section that may be null has a row and a table
                default = show(field.get_default(call_default_factory=True))
                default = "**required**" if field.is_required() else f"`{default}`"
                rows.append(f"| `{dotted((*above, name))}` | {expected(field)} | {default} | {meaning(field)} |")
        if rows and section not in seen:
            title = f"## `{dotted(above)}`" if above else "## Top level"
            head = "| key | value | default | meaning |\n|---|---|---|---|"
            parts.append(f"{title}\n\n{_purpose(section)}\n\n" + "\n".join([head, *rows]))
        seen.add(section)
    return "\n\n".join(parts)


def _purpose(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").strip().splitlines()[0]
