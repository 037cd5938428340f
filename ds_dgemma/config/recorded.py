"""What a run directory is known by, first its config.yaml: every setting of its run, written, read, and held against
the config that goes on.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ds_dgemma.config.run import RunConfig
from ds_dgemma.config.schema import default_of, dotted, lookup, section_of, show
from ds_dgemma.config.section import MAY_CHANGE
from ds_dgemma.config.yaml import CoreDumper, Key, read_yaml
from ds_dgemma.errors import UserError, first_fault, one_line_each

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
COMPLETE = "complete.json"


def resolved_yaml(config: RunConfig) -> str:
    """Every setting with its value, defaults written out, in the order of the reference."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=CoreDumper, sort_keys=False, allow_unicode=True)


def recorded_config(path: Path) -> RunConfig:
    """A run directory's config.yaml.

    Raises:
        UserError: no run of this version wrote it.
    """
    try:
        return RunConfig.model_validate(read_yaml(path)[0])
    except ValidationError as error:
        raise UserError(f"{path} is not what a run of this version writes: {first_fault(error)}.") from error


def check_belongs(config: RunConfig) -> None:
    """Refuse a run directory that holds something else than this run, or this run where it may not go on.

    Raises:
        UserError: what it holds, and how to go on.
    """
    directory = config.run.dir
    if not (directory / CONFIG).is_file():
        if any((directory / CHECKPOINTS).glob("step-*")) or (directory / METRICS).exists():
            raise UserError(
                f"run.dir: {directory} has checkpoints or metrics but no {CONFIG}: it is not a run of ours. Choose "
                "another."
            )
        return
    if config.run.resume == "never":
        raise UserError(
            f"run.dir: {directory} holds a run, and run.resume is never. Choose another run.dir, or resume."
        )
    check_same_run(directory / CONFIG, config)


def check_same_run(path: Path, new: RunConfig) -> None:
    """Refuse to go on with a run where settings that change its numbers differ from those of `path`.

    A setting that the file does not name counts as its default: it was written before the setting existed.

    Raises:
        UserError: those settings; or the file cannot be read.
    """
    try:
        old = read_yaml(path)[0]
    except UserError as error:
        raise UserError(
            f"run.dir: {error} It is this run's record of its settings: put it back (a copy of the run's YAML with "
            "every --set written out does), or choose another directory."
        ) from error
    if problems := list(_changed(old, new.model_dump(mode="json"))):
        advice = (
            "Set these back; or choose another run.dir with run.resume: the path of this run's checkpoint, which goes "
            "on from there with the new settings."
        )
        raise one_line_each(f"{path.parent}, which belongs to another config", problems, advice)


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for key, field in _fixed(RunConfig):
        before, now = lookup(old, key, default_of(field)), lookup(new, key, None)
        if isinstance(before, Mapping) and isinstance(now, Mapping):  # a section that may be null, there in both
            for name in {**before, **now}:
                if before.get(name) != now.get(name):
                    yield _differs((*key, name), before.get(name), now.get(name))
        elif before != now:
            why = " (the learning rate's schedule ends there)" if key == ("train", "max_steps") else ""
            yield _differs(key, before, now) + why


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
