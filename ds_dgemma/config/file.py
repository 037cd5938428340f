"""A YAML file and `--set a.b=value`, to a `RunConfig` or to one error that lists every problem with its line.

Overrides are read as the file is and merged before anything is checked. Relative paths start at the current
directory. Neither torch nor deepspeed is imported: a wrong config fails at once.
"""

import copy
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ds_dgemma.config.faults import faults
from ds_dgemma.config.run import RunConfig
from ds_dgemma.config.schema import dotted, expected, lookup, meaning, nearest, show
from ds_dgemma.config.section import section_of
from ds_dgemma.config.yaml import CoreLoader, Key, read_yaml
from ds_dgemma.errors import UserError, one_line_each

AT_SET = inf  # in place of a line, and behind all lines
NOWHERE = 10**9
UNWRITTEN = object()


class Problem(NamedTuple):
    """One thing to mend: where it stands, what stands there, what is expected."""

    line: float
    what: str  # "optimizer.lr = -1"
    advice: str


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read one run's YAML, apply `--set` overrides and check everything that needs nothing loaded.

    Raises:
        UserError: every problem, in the file's order.
    """
    source = _Source(*read_yaml(path))
    for override in overrides:
        source.override(override)
    config = source.validate()
    for name, advice in faults(config) if config else ():
        source.note(tuple(name.split(".")), advice, config)
    if source.problems or config is None:
        raise _all_problems(path, source.problems)
    return config


class _Source:
    """The values of one file and its overrides, the line where each was written, and the problems found so far."""

    def __init__(self, values: dict[str, Any], lines: dict[Key, int]) -> None:
        self.values = values
        self.lines: dict[Key, float] = {**lines}
        self.problems: list[Problem] = []

    def override(self, override: str) -> None:
        """Merge one `a.b=value`."""
        name, equals, text = override.partition("=")
        key = tuple(name.strip().split("."))
        try:
            value = yaml.load(text, Loader=CoreLoader)  # a SafeLoader
        except yaml.YAMLError:
            self.problems.append(Problem(AT_SET, override, "the value is not valid YAML. Put it in quotes."))
            return
        if not equals or not all(key):
            self.problems.append(Problem(AT_SET, override, "expected key=value, as in optimizer.lr=1e-4."))
            return
        section = self.values
        for part in key[:-1]:
            if not isinstance(section.get(part), dict):
                section[part] = {}
            section = section[part]
        section[key[-1]] = value
        self.lines = {other: line for other, line in self.lines.items() if other[: len(key)] != key} | {key: AT_SET}

    def note(self, key: Key, advice: str, config: RunConfig | None = None) -> None:
        """Note a problem of a setting, with its value; one that is not written has that of `config`."""
        value, default = lookup(self.values, key, UNWRITTEN), ""
        if value is UNWRITTEN and config:
            value, default = lookup(config.model_dump(mode="json"), key, None), " (the default)"
        self._add(key, dotted(key) if value is UNWRITTEN else f"{dotted(key)} = {show(value)}{default}", advice)

    def _add(self, key: Key, what: str, advice: str) -> None:
        """Note a problem where its key, or the closest thing around it, was written."""
        around = (key[:length] for length in range(len(key), 0, -1))
        line = next((self.lines[there] for there in around if there in self.lines), NOWHERE)
        self.problems.append(Problem(line, what, advice))

    def validate(self) -> RunConfig | None:
        """Note every problem; return the config, with defaults where settings are wrong, or None where that is none."""
        values, wrong = copy.deepcopy(self.values), set[Key]()
        while True:
            try:
                config = RunConfig.model_validate(values)
                # a whole section that is wrong may be what the others speak of
                return config if all(len(key) > 1 for key in wrong) else None
            except ValidationError as error:
                found = self._translate(error, wrong)
            wrong |= found
            if not any([_remove(values, key) for key in found]):
                return None

    def _translate(self, error: ValidationError, known: set[Key]) -> set[Key]:
        """Note pydantic's errors in our words, one for each setting that is not `known`; return those settings."""
        noted: set[Key] = set()
        for found in error.errors(include_url=False):
            key, field, inside = _setting(found["loc"])
            counts_good_items = found["type"] == "too_short" and any(other[: len(key)] == key for other in noted)
            if key in noted | known or counts_good_items:
                continue
            noted.add(key)
            if field is None:
                self._add(key, dotted(key), f"unknown setting.{nearest(key)}")
            elif found["type"] == "missing" and not inside:
                self._add(key, dotted(key), f"is required: {expected(field)}; {meaning(field)}.")
            elif found["type"] == "value_error":
                said = found["msg"].removeprefix("Value error, ")
                self._add((*key, said.split()[0]), dotted(key), f"{said}.")  # mostly the setting's name: its line
            else:
                self.note(key, f"expected {expected(field)}: {meaning(field)}.")
        return noted


def _setting(loc: tuple[int | str, ...]) -> tuple[Key, FieldInfo | None, tuple[int | str, ...]]:
    """Split pydantic's location into our key, its field (None: unknown) and what lies inside the value; an item of a
    list of sections is a number in the key.
    """
    section: type[BaseModel] | None = RunConfig
    key: Key = ()
    field: FieldInfo | None = None
    for index, part in enumerate(loc):
        if section is None:
            return key, field, loc[index:]
        key = (*key, str(part))
        if isinstance(part, str):
            field = section.model_fields.get(part)
            section = section_of(field) if field else None
    return key, field, ()


def _remove(values: dict[str, Any], key: Key) -> bool:
    """Leave a setting out; whether there was one."""
    inside = lookup(values, key[:-1], None)
    return isinstance(inside, dict) and inside.pop(key[-1], None) is not None


def _all_problems(path: Path, problems: list[Problem]) -> UserError:
    """One error: in the file's order, `--set` last, columns aligned."""
    names = {AT_SET: "--set", NOWHERE: str(path)}
    rows = [(names.get(line, f"{path}:{line}"), what, advice) for line, what, advice in sorted(problems)]
    wheres = max(len(where) for where, _, _ in rows)
    whats = max((len(what) for _, what, _ in rows if len(what) <= 48), default=0)
    return one_line_each(str(path), [f"{where:<{wheres}}  {what:<{whats}}  {advice}" for where, what, advice in rows])
