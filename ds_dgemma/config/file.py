"""A YAML file and `--set a.b=value`, to a `RunConfig` or to one error that lists every problem with its line.

The file is read as YAML 1.2 core types, so `1e-4` is a number, `on` and `off` are text and `010` is ten
(PyYAML alone reads YAML 1.1). Overrides are read the same way and merged before anything is checked. Relative
paths start at the current directory. Neither torch nor deepspeed is imported: a wrong config fails at once.
"""

import copy
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ds_dgemma.config.division import divisors, either
from ds_dgemma.config.run import RunConfig
from ds_dgemma.config.schema import (
    Key,
    dotted,
    expected,
    lookup,
    meaning,
    members_of,
    nearest,
    section_of,
    settings,
    show,
)
from ds_dgemma.config.yaml import CoreDumper, CoreLoader
from ds_dgemma.errors import UserError, first_fault, first_line, one_line_each


class Problem(NamedTuple):
    """One thing to mend: where it stands, what stands there, what is expected."""

    where: str  # "sft.yaml:12" or "--set"
    what: str  # "optimizer.lr = -1"
    advice: str

    @property
    def line(self) -> float:
        """The line in the file; what has none stands last."""
        number = self.where.rpartition(":")[2]
        return int(number) if number.isdigit() else float("inf")


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read one run's YAML, apply `--set` overrides and check everything that needs nothing loaded."""
    source = _Source(path)
    source.read()
    for override in overrides:
        source.override(override)
    config = source.validate()
    if config is not None:
        source.problems.extend(_cross_section_problems(config, source))
    if source.problems or config is None:
        raise _all_problems(str(path), source.problems)
    return config


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, its settings unchecked: for a run directory's config.yaml."""
    source = _Source(path)
    source.read()
    if source.problems:
        raise _all_problems(str(path), source.problems)
    return source.values


def recorded_config(path: Path) -> RunConfig:
    """A run directory's config.yaml.

    Raises:
        UserError: no run of this version wrote it.
    """
    try:
        return RunConfig.model_validate(read_yaml(path))
    except ValidationError as error:
        raise UserError(f"{path} is not what a run of this version writes: {first_fault(error)}.") from error


def resolved_yaml(config: RunConfig) -> str:
    """Every setting with its value, defaults written out, in the order of the reference."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=CoreDumper, sort_keys=False, allow_unicode=True)


class _Source:
    """The values of one file and its overrides, where each was written, and the problems found so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = {}
        self.places: dict[Key, str] = {}
        self.problems: list[Problem] = []

    def read(self) -> None:
        """Fill `values` from the file; a file that is no YAML mapping is an error at once."""
        text = _read_text(self.path)
        try:
            loader = CoreLoader(text)
            node = loader.get_single_node()
            if not isinstance(node, yaml.MappingNode):
                found = f"starts as a list or plain text, line {node.start_mark.line + 1}" if node else "is empty"
                raise UserError(f"{self.path} holds no settings: it {found}. Expected `key: value` lines.")
            self.values = self._walk(loader, node, ())
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f"{self.path}:{mark.line + 1}" if mark else str(self.path)
            begun = f" ({error.context}, line {error.context_mark.line + 1})" if error.context_mark else ""
            raise UserError(f"{place} is not valid YAML: {error.problem or error.context}{begun}") from None
        except yaml.YAMLError as error:
            raise UserError(f"{self.path} is not valid YAML: {first_line(error)}") from None

    def _walk(self, loader: CoreLoader, mapping: yaml.MappingNode, above: Key) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name_node, node in mapping.value:
            line = name_node.start_mark.line + 1
            place, key = f"{self.path}:{line}", (*above, str(name_node.value))
            if key[-1] in values:
                first = self.places[key].rpartition(":")[2]
                self.problems.append(
                    Problem(place, dotted(key), f"is set twice, first on line {first}. Keep one of them.")
                )
                continue
            self.places[key] = place
            if isinstance(node, yaml.MappingNode):
                values[key[-1]] = self._walk(loader, node, key)
            else:
                values[key[-1]] = loader.construct_object(node, deep=True)
        return values

    def override(self, override: str) -> None:
        """Merge one `a.b=value`."""
        name, equals, text = override.partition("=")
        key = tuple(name.strip().split("."))
        if not equals or not all(key):
            self.problems.append(Problem("--set", override, "expected key=value, as in optimizer.lr=1e-4."))
            return
        try:
            value = yaml.load(text, Loader=CoreLoader)  # a SafeLoader
        except yaml.YAMLError:
            self.problems.append(Problem("--set", override, "the value is not valid YAML. Put it in quotes."))
            return
        section = self.values
        for depth, part in enumerate(key[:-1], start=1):
            if not isinstance(section.get(part), dict):
                section[part] = {}
                self.places[key[:depth]] = "--set"
            section = section[part]
        section[key[-1]] = value
        self.places = {other: place for other, place in self.places.items() if other[: len(key)] != key}
        self.places[key] = "--set"

    def place(self, key: Key) -> str:
        """Where a key, or the closest thing around it, was written."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.places:
                return self.places[key[:length]]
        return str(self.path)

    def validate(self) -> RunConfig | None:
        """Note every problem; return the config, with defaults where settings are wrong, or None where that is none."""
        values = copy.deepcopy(self.values)
        wrong = dict(_booleans_for_numbers(self))
        self.problems.extend(wrong.values())
        while True:
            for key in wrong:
                _remove(values, key)
            try:
                config = RunConfig.model_validate(values)
                # a whole section that is wrong may be what the others speak of
                return config if all(len(key) > 1 for key in wrong) else None
            except ValidationError as error:
                found = {key: problem for key, problem in _translate(error, self) if key not in wrong}
            self.problems.extend(found.values())
            if not any(_remove(values, key) for key in found):
                return None
            wrong |= found


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, beside, n=1)
        hint = f" Did you mean {path.parent / close[0]}?" if close else ""
        raise UserError(f"{path} does not exist (looked in {Path.cwd()}).{hint}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory. Give the run's YAML file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _all_problems(heading: str, problems: Sequence[Problem]) -> UserError:
    """One error: in the file's order, `--set` last, columns aligned."""
    problems = sorted(problems, key=lambda problem: problem.line)
    places = max(len(problem.where) for problem in problems)
    whats = max((len(p.what) for p in problems if len(p.what) <= 48), default=0)
    return one_line_each(heading, [f"{p.where:<{places}}  {p.what:<{whats}}  {p.advice}" for p in problems])


def _remove(values: dict[str, Any], key: Key) -> bool:
    """Leave a setting out; whether there was one."""
    inside: Any = values
    for part in key[:-1]:
        inside = inside.get(part) if isinstance(inside, dict) else None
    return isinstance(inside, dict) and inside.pop(key[-1], None) is not None


def _translate(error: ValidationError, source: _Source) -> Iterator[tuple[Key, Problem]]:
    """pydantic's errors in our words, by setting; the branches of one union become one problem."""
    seen: set[Key] = set()
    for found in error.errors(include_url=False):
        key, field, inside = _resolve(found["loc"])
        counts_good_items = found["type"] == "too_short" and any(other[: len(key)] == key for other in seen)
        if key in seen or counts_good_items:
            continue
        seen.add(key)
        if field is None:
            yield key, Problem(source.place(key), dotted(key), f"unknown setting.{nearest(key)}")
        elif found["type"] == "missing" and not inside:
            yield key, Problem(source.place(key), dotted(key), f"is required: {expected(field)}; {meaning(field)}.")
        elif found["type"] == "value_error":
            yield key, Problem(source.place(key), dotted(key), f"{found['msg'].removeprefix('Value error, ')}.")
        else:
            yield key, _wrong_value(key, field, source)


def _wrong_value(key: Key, field: FieldInfo, source: _Source) -> Problem:
    what = f"{dotted(key)} = {show(lookup(source.values, key, None))}"
    return Problem(source.place(key), what, f"expected {expected(field)}: {meaning(field)}.")


def _resolve(loc: tuple[int | str, ...]) -> tuple[Key, FieldInfo | None, tuple[int | str, ...]]:
    """Split pydantic's location into our key, its field (None: unknown) and what lies inside the value; an item of a
    list of sections is a number in the key.
    """
    section: type[BaseModel] | None = RunConfig
    key: Key = ()
    field: FieldInfo | None = None
    for index, part in enumerate(loc):
        if section is None:
            return key, field, loc[index:]
        if isinstance(part, int):  # a place in a list of sections
            key = (*key, str(part))
            continue
        key, field = (*key, part), section.model_fields.get(part)
        section = section_of(field) if field else None
    return key, field, ()


def _booleans_for_numbers(source: _Source) -> Iterator[tuple[Key, Problem]]:
    """pydantic reads true as 1; nobody means that."""
    for key, field in settings(inside_optional=True):
        if isinstance(lookup(source.values, key, None), bool) and bool not in members_of(field.annotation):
            yield key, _wrong_value(key, field, source)


def _cross_section_problems(config: RunConfig, source: _Source) -> Iterator[Problem]:
    def problem(key: str, advice: str) -> Problem:
        parts = tuple(key.split("."))
        default = "" if parts in source.places else " (the default)"
        return Problem(source.place(parts), f"{key} = {show(_value(config, parts))}{default}", advice)

    train = config.train
    if train.global_batch_size % train.micro_batch_size:
        fits = either(divisors(train.global_batch_size))
        yield problem(
            "train.micro_batch_size",
            f"does not divide train.global_batch_size {train.global_batch_size}. Set {fits}.",
        )
    for fault in config.faults():
        yield problem(*fault)
    model = Path(config.model.path)
    if model.is_dir() and config.run.dir.resolve().is_relative_to(model.resolve()):
        yield problem("run.dir", f"is in the model's own directory, {model}. Choose another place.")
    if not config.deepspeed.is_file():
        yield problem("deepspeed", _missing_json(config.deepspeed, source.path))


def _missing_json(wanted: Path, config_path: Path) -> str:
    base = config_path.resolve().parent
    places = [base / wanted, base / wanted.name, base.parent / wanted, base.parent / wanted.name]
    there = next((place for place in places if place.is_file()), None)
    hint = (
        f" But there is {there}: give that path, or start from the folder that yours is relative to." if there else ""
    )
    return f"no such file; relative paths start at the current directory, {Path.cwd()}.{hint}"


def _value(config: BaseModel, key: Key) -> Any:
    value: Any = config
    for part in key:
        value = getattr(value, part)
    return value
