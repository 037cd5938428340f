"""Whether a config goes on with a run: what a run directory's config.yaml fixes."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ds_dgemma.config.run import RunConfig
from ds_dgemma.config.schema import Key, default_of, dotted, lookup, section_of, show
from ds_dgemma.config.section import MAY_CHANGE


def same_run_problems(old: Mapping[str, Any], new: RunConfig) -> list[str]:
    """Settings that change a run's numbers and differ from `old`, the run directory's config.yaml.

    A setting that `old` does not name counts as its default: it was written before the setting existed.
    """
    dumped = new.model_dump(mode="json")
    problems = []
    for key, field in _fixed(RunConfig):
        before, now = lookup(old, key, default_of(field)), lookup(dumped, key, None)
        if isinstance(before, Mapping) and isinstance(now, Mapping):  # a section that may be null, there in both
            problems += [
                _differs((*key, name), before.get(name), now.get(name))
                for name in {**before, **now}
                if before.get(name) != now.get(name)
            ]
        elif before != now:
            why = " (the learning rate's schedule ends there)" if key == ("train", "max_steps") else ""
            problems.append(_differs(key, before, now) + why)
    return problems


def _fixed(section: type[BaseModel], above: Key = ()) -> Iterator[tuple[Key, FieldInfo]]:
    for name, field in section.model_fields.items():
        below = section_of(field)
        if MAY_CHANGE in field.metadata:
            continue
        if below is not None and below is field.annotation:
            yield from _fixed(below, (*above, name))
        else:
            yield (*above, name), field


def _differs(key: Key, before: Any, now: Any) -> str:
    return f"{dotted(key)}: run directory has {show(before)}, this config says {show(now)}"
