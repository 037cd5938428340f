"""Answers to prompts of token ids, in batches, each as `generate()` gives it alone with its own seed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import track
from transformers import PreTrainedTokenizerFast

from ds_dgemma.errors import UserError
from ds_dgemma.evaluation.open_model import OpenModel
from ds_dgemma.evaluation.sampler import Answer, Draft, Group, Sampler


@dataclass(frozen=True)
class Said:
    """An answer, and its text up to the stop."""

    text: str
    answer: Answer
    tokens: int  # before the stop


def said_of(answer: Answer, stop_ids: frozenset[int], tokenizer: PreTrainedTokenizerFast) -> Said:
    """An answer as text; stray special tokens stay visible, for they make it wrong."""
    tokens = answer.before_stop(stop_ids)
    text = tokenizer.decode(tokens)
    assert isinstance(text, str)  # one sequence
    return Said(text, answer, len(tokens))


def answer_prompts(
    model: OpenModel,
    prompts: Sequence[list[int]],
    batch_size: int,
    seeds: Sequence[int],
    watch: Callable[[Draft], None] | None = None,
) -> list[Said]:
    """Answer prompts, each with its seed and whatever `batch_size` is; in the order of the prompts.

    Raises:
        UserError: the model's scores are no numbers.
    """
    sampler = Sampler(model.stack, model.found.settings, model.device, images=model.found.images)
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))  # alike ones need fewer calls
    batches = [by_length[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    said: dict[int, Said] = {}
    console = Console(stderr=True)
    shows = console.is_terminal and watch is None and len(batches) > 1
    for rows in track(batches, "answering", console=console, transient=True, disable=not shows):
        for row, (answer,) in zip(
            rows, sampler.answer([Group([prompts[row]], seeds[row]) for row in rows], watch), strict=True
        ):
            if not answer.is_finite:
                raise UserError(
                    f"{model.found.source} answers with NaN or infinity: its weights hold some, or training has "
                    "diverged. Take an earlier checkpoint."
                )
            said[row] = said_of(answer, model.stop_ids, model.found.model.tokenizer)
    return [said[row] for row in range(len(prompts))]
