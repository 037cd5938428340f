"""YAML files with the line of every setting, in YAML 1.2's core types.

PyYAML alone reads YAML 1.1: here `1e-4` is a number, `on` and `off` are text and `010` is ten.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from ds_dgemma.errors import UserError, first_line

# What PyYAML raises of no YAML, of a tag that its value does not fit, and of nesting without end
BROKEN = (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
NOWHERE, AT_SET = 10**9, 10**10  # in place of a line, and behind all lines
ABSENT = object()

Key = tuple[str, ...]


class Written(dict[str, Any]):
    """A mapping that knows where its keys are written: the line of each, from 1, or AT_SET."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, int] = {}


class CoreLoader(yaml.SafeLoader):
    """YAML 1.2's core types; a mapping is `Written`, each key is text and stands once."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (PyYAML's own name and type; empty, so that 1.1's are not inherited)


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
    text = str(loader.construct_scalar(node))  # Python refuses thousands of digits: text, which no setting takes
    return text if len(text) > 100 else int(text, 0 if text[:2] in ("0o", "0x") else 10)


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> Written:
    made = Written()
    for name, value in node.value:
        if not isinstance(name, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=name.start_mark)
        if (key := name.value) in made.lines:  # PyYAML's own lets the last one win
            problem = f"{key} is set twice, first on line {made.lines[key]}. Keep one of them"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=name.start_mark)
        made.lines[key] = name.start_mark.line + 1
        made[key] = loader.construct_object(value, deep=True)
    return made


CoreLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
CoreLoader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def read_yaml(path: Path) -> Written:
    """The mapping in a file.

    Raises:
        UserError: the file cannot be read, or is no YAML mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=CoreLoader)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Give the run's YAML file.") from None
    except yaml.MarkedYAMLError as error:
        mark: Any = error.problem_mark or error.context_mark
        begun = f" ({error.context}, line {error.context_mark.line + 1})" if error.context_mark else ""
        raise UserError(f"{path}:{mark.line + 1} is not valid YAML: {error.problem or error.context}{begun}") from None
    except BROKEN as error:
        raise UserError(f"{path} is not valid YAML in UTF-8: {first_line(error)}") from None
    if not isinstance(values, Written):
        found = "is empty" if values is None else "starts as a list or plain text"
        raise UserError(f"{path} holds no settings: it {found}. Expected `key: value` lines.")
    return values


def find(values: Any, key: Key) -> tuple[int, Any]:
    """The line of a key, or of the closest thing around it, and its value or ABSENT; numbers are places in a list."""
    line = NOWHERE
    for part in key:
        if isinstance(values, list) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
        elif isinstance(values, Written) and part in values:
            line, values = line if line == AT_SET else values.lines[part], values[part]
        else:
            return line, ABSENT
    return line, values
