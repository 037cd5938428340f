"""What a run directory is known by, first its config.yaml: every setting of its run, written, read, and held against
the config that goes on.
"""

from collections.abc import Iterator
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError

from ds_dgemma.config.run import RunConfig
from ds_dgemma.config.schema import dotted, show
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
        return RunConfig.model_validate(read_yaml(path))
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
        old = recorded_config(path)
    except UserError as error:
        raise UserError(
            f"run.dir: {error} It is this run's record of its settings: put it back (a copy of the run's YAML with "
            "every --set written out does), or choose another directory."
        ) from error
    if problems := list(_differences(old, new)):
        advice = (
            "Set these back; or choose another run.dir with run.resume: the path of this run's checkpoint, which goes "
            "on from there with the new settings."
        )
        raise one_line_each(f"{path.parent}, which belongs to another config", problems, advice)


def _differences(old: BaseModel, new: BaseModel, above: Key = ()) -> Iterator[str]:
    before, now = old.model_dump(mode="json"), new.model_dump(mode="json")
    for name, field in type(new).model_fields.items():
        key, left, right = (*above, name), getattr(old, name), getattr(new, name)
        if MAY_CHANGE in field.metadata:
            continue
        if isinstance(left, BaseModel) and isinstance(right, BaseModel):
            yield from _differences(left, right, key)
        elif before[name] != now[name]:
            why = " (the learning rate's schedule ends there)" if key == ("train", "max_steps") else ""
            yield f"{dotted(key)}: run directory has {show(before[name])}, this config says {show(now[name])}{why}"
