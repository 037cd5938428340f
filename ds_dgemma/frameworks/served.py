"""A model that answers for a framework: named by a path, given settings as words, asked for texts."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ds_dgemma.config.recorded import CHECKPOINTS
from ds_dgemma.errors import UserError
from ds_dgemma.evaluation.answers import Said, answer_prompts
from ds_dgemma.evaluation.open_model import OpenModel, Source, find_model, load_model
from ds_dgemma.evaluation.sampler_settings import SamplerSettings

FOUND_BY = ("adapter", "step", "revision")  # beside the path
SETTINGS = tuple(field.name for field in fields(SamplerSettings) if field.name not in ("stop_ids", "pad_id"))


def whole(name: str, value: Any, least: int) -> int:
    """A whole number that a framework was given.

    Raises:
        UserError: it is none, or less than `least`.
    """
    if not str(value).isdecimal() or int(value) < least:
        raise UserError(f"{name}={value}: a whole number of at least {least} was expected.")
    return int(value)


def open_path(path: str, given: dict[str, Any]) -> OpenModel:
    """Load what lies at `path`: a run's directory, a PEFT adapter (on the base that it names), a checkpoint or a hub
    id; `given` are `adapter`, `step` and `revision`, and settings of the sampler.

    Raises:
        UserError: an unknown name in `given`, or no model there.
    """
    if unknown := given.keys() - {*FOUND_BY, *SETTINGS}:
        raise UserError(f"{', '.join(sorted(unknown))}: no such setting. There are: {', '.join(FOUND_BY + SETTINGS)}.")
    found_by = {name: value for name, value in given.items() if name in FOUND_BY}
    return load_model(find_model(source_at(path, **found_by), {n: v for n, v in given.items() if n in SETTINGS}))


def source_at(
    path: str, adapter: str | None = None, step: int | str | None = None, revision: str | None = None
) -> Source:
    """What a path is, by what lies there.

    Raises:
        UserError: a step of what is no run, or an adapter that does not say on what it was trained.
    """
    folder = Path(path)
    if (folder / CHECKPOINTS).is_dir():
        if adapter is not None or revision is not None:
            raise UserError(f"{path} is a run, which has neither an adapter nor a revision beside it. Leave them out.")
        if step not in (None, "best") and not str(step).isdecimal():
            raise UserError(f"step {step}: a number or best was expected.")
        return Source(run=folder, step="best" if step == "best" else None if step is None else int(step))
    if step is not None:
        raise UserError(f"step {step}: {path} is no run directory (no checkpoints/ in it), and only a run has steps.")
    config = folder / "adapter_config.json"
    if not config.is_file():
        return Source(path, revision, None if adapter is None else Path(adapter))
    try:
        named = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        named = None
    if not named:
        raise UserError(f"{config} names no base model (base_model_name_or_path). Give the base, and adapter={path}.")
    return Source(named, revision, folder)


def answer_texts(
    model: OpenModel, prompts: Sequence[list[int]], seeds: Iterable[int], max_new_tokens: int | None, batch_size: int
) -> list[Said]:
    """Answer prompts, each with its seed; None: as many tokens as the model's settings say."""
    if max_new_tokens is not None:
        settings = replace(model.found.settings, max_new_tokens=max_new_tokens)
        model = replace(model, found=replace(model.found, settings=settings))
    return answer_prompts(model, prompts, batch_size, list(seeds))


def cut(said: Said, most: int | None, stops: Iterable[str], model: OpenModel) -> tuple[str, bool]:
    """An answer's text as a framework asked for it: `most` tokens, ended by the first of `stops`; whether it ended so,
    or by itself, rather than because it was too long.
    """
    text, ended = said.text, said.answer.stopped
    if most is not None and said.tokens > most:  # whole canvases are made
        tokens = said.answer.before_stop(model.stop_ids)[:most]
        text, ended = str(model.found.model.tokenizer.decode(tokens)), False
    ends = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return (text[: min(ends)], True) if ends else (text, ended)
