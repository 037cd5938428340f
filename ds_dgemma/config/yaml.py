"""YAML files with the line of every setting, in YAML 1.2's core types.

PyYAML alone reads YAML 1.1: here `1e-4` is a number, `on` and `off` are text and `010` is ten.
"""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ds_dgemma.errors import UserError, first_line

LONGEST_INT = 100  # digits

Key = tuple[str, ...]


class CoreLoader(yaml.SafeLoader):
    """YAML 1.2's core types; every key is text, and stands once."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (PyYAML's own name and type; empty, so that 1.1's are not inherited)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """PyYAML's own lets the last of two equal keys win."""
        first: dict[str, int] = {}
        for name, _ in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=name.start_mark)
            if (key := name.value) in first:
                problem = f"{key} is set twice, first on line {first[key]}. Keep one of them"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=name.start_mark)
            first[key] = name.start_mark.line + 1
        return {name.value: self.construct_object(value, deep=True) for name, value in node.value}


class CoreDumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as another type."""


_CORE_TYPES = {
    "null": r"^(~|null|Null|NULL|)$",
    "bool": r"^(true|True|TRUE|false|False|FALSE)$",
    "int": r"^([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$",
    "float": r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$",
}
for _name, _pattern in _CORE_TYPES.items():
    for _yaml in (CoreLoader, CoreDumper):
        _yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), None)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | str:
    text = str(loader.construct_scalar(node))
    if len(text) > LONGEST_INT:
        return text  # Python refuses thousands of digits; no setting is a text of digits, so it is told as a wrong one
    return int(text, 0 if text[:2] in ("0o", "0x") else 10)


CoreLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[Key, int]]:
    """The mapping in a file, and the line of each of its keys.

    Raises:
        UserError: the file cannot be read, or is no YAML mapping.
    """
    text = _read_text(path)
    try:
        loader = CoreLoader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            found = f"starts as a list or plain text, line {node.start_mark.line + 1}" if node else "is empty"
            raise UserError(f"{path} holds no settings: it {found}. Expected `key: value` lines.")
        # deep: a node that holds itself is an error
        return loader.construct_object(node, deep=True), dict(_lines(node))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        begun = f" ({error.context}, line {error.context_mark.line + 1})" if error.context_mark else ""
        raise UserError(f"{place} is not valid YAML: {error.problem or error.context}{begun}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {first_line(error)}") from None


def _lines(node: yaml.MappingNode, above: Key = ()) -> Iterator[tuple[Key, int]]:
    for name, value in node.value:
        key = (*above, name.value)
        yield key, name.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            yield from _lines(value, key)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        close = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f" Did you mean {path.parent / close[0]}?" if close else ""
        raise UserError(f"{path} does not exist (looked in {Path.cwd()}).{hint}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}).") from None
    except OSError as error:  # a directory, rights
        raise UserError(f"{path} cannot be read: {error.strerror}. Give the run's YAML file.") from None
