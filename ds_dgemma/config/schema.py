"""The settings in words, read from the pydantic models: errors and the reference can't fall behind them.

A key is a path in the schema, `("optimizer", "lr")`, and is shown to people with dots.
"""

import difflib
import json
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ds_dgemma.config.run import RunConfig
from ds_dgemma.config.section import members_of, section_of
from ds_dgemma.config.yaml import Key

RENAMED: dict[Key, Key] = {("data", "assistant_turns"): ("data", "learn")}
REFERENCE_BEGIN = "<!-- config reference: begin -->"
REFERENCE_END = "<!-- config reference: end -->"


def dotted(key: Key) -> str:
    """A key as people write it."""
    return ".".join(key)


def settings(section: type[BaseModel] = RunConfig, above: Key = ()) -> Iterator[Key]:
    """Every key of the schema, a section's before those in it."""
    for name, field in section.model_fields.items():
        yield (*above, name)
        if below := section_of(field):
            yield from settings(below, (*above, name))


def default_of(field: FieldInfo) -> Any:
    """A field's default as YAML holds it; None where it is required."""
    return None if field.is_required() else plain(field.get_default(call_default_factory=True))


def nearest(key: Key) -> str:
    """Advice for an unknown key: a close name beside it, the same name elsewhere, or what is known there."""
    written, key = key, (*(part for part in key[:-1] if not part.isdigit()), key[-1])  # without places in a list
    known = sorted(settings(), key=dotted)
    beside = [other[-1] for other in known if other[:-1] == key[:-1]]
    same = [dotted(other) for other in known if other[-1] == key[-1]]
    if key in RENAMED:
        return f" It is {dotted(RENAMED[key])} now."
    if len(key) == 1 and tuple(key[0].split(".")) in known:
        section, _, name = key[0].rpartition(".")
        return f" In a file, write {name}: indented below {section}:."
    if close := difflib.get_close_matches(key[-1], beside, n=1):
        return f" Did you mean {dotted((*written[:-1], close[0]))}?"
    if found := same or difflib.get_close_matches(dotted(key), map(dotted, known), n=1, cutoff=0.75):
        return f" Did you mean {' or '.join(found)}?"
    return f" Known here: {', '.join(beside)}." if beside else ""


def expected(field: FieldInfo) -> str:
    """A field's type and bounds in words: "a number > 0", "bf16 or fp32", "a section with dir"."""
    section = section_of(field)
    if section is not None:
        required = [name for name, inner in section.model_fields.items() if inner.is_required()]
        null = "null or " if type(None) in get_args(field.annotation) else ""
        what = (
            "a list of sections" if any(get_origin(m) is tuple for m in members_of(field.annotation)) else "a section"
        )
        return f"{null}{what} with {', '.join(required or section.model_fields)}"
    return _type_in_words(field.annotation) + _bounds_in_words(field.metadata)


def _bounds_in_words(metadata: Iterable[Any]) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [
        f"{sign} {getattr(bound, name)}" for bound in metadata for name, sign in signs.items() if hasattr(bound, name)
    ]
    return f" {' and '.join(bounds)}" if bounds else ""


def _type_in_words(annotation: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    if annotation in words:
        return words[annotation]
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inside = members[1].metadata if isinstance(members[1], FieldInfo) else members[1:]
        return _type_in_words(members[0]) + _bounds_in_words(inside)
    if origin is Literal:
        *most, last = map(str, members)
        return f"{', '.join(most)} or {last}" if most else last
    if origin in (Union, types.UnionType):
        return " or ".join("null" if member is type(None) else _type_in_words(member) for member in members)
    if origin is dict:
        return "a mapping"
    if origin is tuple:
        inner = _type_in_words(members[0]).removeprefix("a ")
        return f"a list of {inner}" if members[-1] is Ellipsis else f"a list of {len(members)} {inner}s"
    raise TypeError(f"no words for a setting of type {annotation}")


def meaning(field: FieldInfo) -> str:
    """A field's description; a section's is the first sentence of its docstring."""
    section = section_of(field)
    if field.description or section is None:
        return field.description or ""
    return (section.__doc__ or "").strip().splitlines()[0].rstrip(".")


def plain(value: Any) -> Any:
    """A setting as YAML and JSON hold it."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def show(value: Any) -> str:
    """A value for one line of a message; of a long path or word, both ends."""
    text = json.dumps(plain(value), ensure_ascii=False, default=str)
    if len(text) <= 60:
        return text
    return f"{text[:25]}...{text[-32:]}" if isinstance(value, str | Path) else text[:57] + "..."


def lookup(values: Any, key: Key, default: Any) -> Any:
    """What nested mappings and lists hold under a key."""
    for part in key:
        if isinstance(values, list) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
            continue
        if not isinstance(values, Mapping) or part not in values:
            return default
        values = values[part]
    return values


def reference_markdown() -> str:
    """The config reference: one table for every section."""
    return "\n\n".join(_tables((), RunConfig, set())) + "\n"


def update_reference(document: Path) -> None:
    """Write the reference between the two marks in a Markdown file."""
    before, _, rest = document.read_text(encoding="utf-8").partition(REFERENCE_BEGIN)
    _, _, after = rest.partition(REFERENCE_END)
    marked = f"{REFERENCE_BEGIN}\n\n{reference_markdown()}\n{REFERENCE_END}"
    document.write_text(before + marked + after, encoding="utf-8")


def _tables(above: Key, section: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[str]:
    rows = [_row((*above, name), field) for name, field in section.model_fields.items() if _has_a_row(field)]
    title = f"### `{dotted(above)}`" if above else "### Top level"
    if rows:
        purpose = (section.__doc__ or "").strip().splitlines()[0]
        yield "\n".join([title, "", purpose, "", "| key | value | default | meaning |", "|---|---|---|---|", *rows])
    for name, field in section.model_fields.items():
        if (below := section_of(field)) is not None and below not in seen:
            seen.add(below)
            yield from _tables((*above, name), below, seen)


def _has_a_row(field: FieldInfo) -> bool:
    return section_of(field) is not field.annotation  # a section that may be null has a row and a table


def _row(key: Key, field: FieldInfo) -> str:
    default = "**required**" if field.is_required() else f"`{show(default_of(field))}`"
    return f"| `{dotted(key)}` | {expected(field)} | {default} | {meaning(field)} |"


if __name__ == "__main__":
    update_reference(Path(sys.argv[1]))
