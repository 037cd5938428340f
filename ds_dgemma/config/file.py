"""A YAML file and `--set a.b=value`, to a `RunConfig` or to one error that lists every problem with its line.

Overrides are read as the file is and merged before anything is checked. Relative paths start at the current
directory. Neither torch nor deepspeed is imported: a wrong config fails at once.
"""

import copy
import re
from collections.abc import Sequence
from functools import reduce
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ds_dgemma.config.faults import faults
from ds_dgemma.config.run import RunConfig
from ds_dgemma.config.schema import dotted, expected, meaning, nearest, show
from ds_dgemma.config.section import section_of
from ds_dgemma.config.yaml import ABSENT, AT_SET, BROKEN, NOWHERE, CoreLoader, Key, Written, find, read_yaml
from ds_dgemma.errors import UserError, did_you_mean, one_line_each


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read one run's YAML, apply `--set` overrides and check everything that needs nothing loaded.

    Raises:
        UserError: every problem, in the file's order.
    """
    if not path.exists():
        near = did_you_mean(str(path), map(str, path.parent.glob("*.yaml")))
        raise UserError(f"{path} does not exist (looked in {Path.cwd()}).{near}")
    source = _Source(read_yaml(path))
    for override in overrides:
        source.override(override)
    config = source.validate()
    for name, advice in faults(config) if config else ():
        source.note(tuple(name.split(".")), advice, config)
    if source.problems or config is None:
        names, problems = {AT_SET: "--set", NOWHERE: str(path)}, sorted(source.problems)
        lines = [f"{names.get(line, f'{path}:{line}')}  {what}  {advice}" for line, what, advice in problems]
        raise one_line_each(str(path), lines)
    return config


class _Source:
    """The values of one file and its overrides, and the problems found so far."""

    def __init__(self, values: Written) -> None:
        self.values = values
        self.problems: list[tuple[int, str, str]] = []  # the line, what stands there, and what is expected

    def override(self, override: str) -> None:
        """Merge one `a.b=value`."""
        name, equals, text = override.partition("=")
        *above, last = name.strip().split(".")
        try:
            value = yaml.load(text, Loader=CoreLoader)  # a SafeLoader
            if not equals or not all((*above, last)):
                raise ValueError
        except BROKEN as error:
            why = getattr(error, "problem", None) or "the value is YAML, or stands in quotes"
            self.problems.append((AT_SET, override, f"expected key=value, as in optimizer.lr=1e-4: {why}."))
            return
        section = self.values
        for part in above:
            if not isinstance(section.get(part), Written):
                section[part], section.lines[part] = Written(), AT_SET
            section = section[part]
        section[last], section.lines[last] = value, AT_SET

    def note(self, key: Key, advice: str, config: RunConfig | None = None) -> None:
        """Note a problem of a setting, with its value; one that is not written has that of `config`."""
        (line, value), what = find(self.values, key), dotted(key)
        if value is not ABSENT:
            what += f" = {show(value)}"
        elif config:
            what += f" = {show(reduce(getattr, key, config))} (the default)"
        self.problems.append((line, what, advice))

    def validate(self) -> RunConfig | None:
        """Note every problem; return the config, with defaults where settings are wrong, or None where that is none."""
        values, wrong = copy.deepcopy(self.values), set[Key]()
        while True:
            try:
                config = RunConfig.model_validate(values)
                whole = [name for name, field in RunConfig.model_fields.items() if section_of(field)]
                return config if wrong.isdisjoint((name,) for name in whole) else None  # others may speak of it
            except ValidationError as error:
                found = self._translate(error, wrong)
            wrong |= found
            inside = [(find(values, key[:-1])[1], key[-1]) for key in found]
            if not any([isinstance(section, dict) and section.pop(name, None) is not None for section, name in inside]):
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
                self.note(key, f"unknown setting.{nearest(key)}")
            elif found["type"] == "value_error":
                said = found["msg"].removeprefix("Value error, ")
                named = [(*key, word) for word in re.findall(r"\w+", said)]  # the first setting that is written
                self.note(next((one for one in named if find(self.values, one)[1] is not ABSENT), key), f"{said}.")
            else:
                required = "is required; " if found["type"] == "missing" and not inside else ""
                self.note(key, f"{required}expected {expected(field)}: {meaning(field)}.")
        return noted


def _setting(loc: tuple[int | str, ...]) -> tuple[Key, FieldInfo | None, tuple[int | str, ...]]:
    """Pydantic's location as our key, with places in lists; its field (None: unknown); what lies inside the value."""
    section: type[BaseModel] | None = RunConfig
    key: Key = ()
    field: FieldInfo | None = None
    for part in loc:
        if section is None:
            break
        key = (*key, str(part))
        if isinstance(part, str):
            field = section.model_fields.get(part)
            section = section_of(field) if field else None
    return key, field, loc[len(key) :]
