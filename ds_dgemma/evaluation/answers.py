"""Answers to prompts of token ids, in batches, each as `generate()` gives it alone with its own seed."""

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.progress import track

from ds_dgemma.errors import UserError
from ds_dgemma.evaluation.open_model import OpenModel
from ds_dgemma.evaluation.sampler import Answer, Draft, Group, Sampler


@dataclass(frozen=True)
class Said:
    """An answer, and its text up to the stop."""

    text: str
    answer: Answer
    tokens: int  # before the stop


def answer_prompts(
    model: OpenModel,
    prompts: list[list[int]],
    batch_size: int,
    seed: int,
    watch: Callable[[Draft], None] | None = None,
) -> list[Said]:
    """Answer prompts, the n-th with the seed `seed + n`, whatever `batch_size` is; in the order of the prompts.

    Raises:
        UserError: the model's scores are no numbers.
    """
    sampler = Sampler(model.stack, model.found.settings, model.device)
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))  # alike ones need fewer calls
    batches = [by_length[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    said: dict[int, Said] = {}
    console = Console(stderr=True)
    shows = console.is_terminal and watch is None and len(batches) > 1
    for rows in track(batches, "answering", console=console, transient=True, disable=not shows):
        for row, (answer,) in zip(
            rows, sampler.answer([Group([prompts[row]], seed + row) for row in rows], watch), strict=True
        ):
            if not answer.is_finite:
                raise UserError(
                    f"{model.found.source} answers with NaN or infinity: its weights hold some, or training has "
                    "diverged. Take an earlier checkpoint."
                )
            tokens = answer.before_stop(model.stop_ids)
            text = model.found.tokenizer.decode(tokens)  # stray special tokens stay visible: they make an answer wrong
            assert isinstance(text, str)  # one sequence
            said[row] = Said(text, answer, len(tokens))
    return [said[row] for row in range(len(prompts))]
