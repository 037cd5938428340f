"""Answer held-out conversations and score the answers by a task."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerFast

from ds_dgemma.config.data import DataSection
from ds_dgemma.errors import UserError
from ds_dgemma.evaluation.answers import Said, answer_prompts
from ds_dgemma.evaluation.open_model import Found, load_model
from ds_dgemma.evaluation.questions import Question, prompt_ids, read_questions
from ds_dgemma.evaluation.scores import Score, summarise
from ds_dgemma.evaluation.tasks import Task, find_task

SAMPLES = 5  # answers in a report


def evaluate(
    found: Found,
    data: DataSection,
    task_name: str,
    *,
    batch_size: int,
    limit: int | None,
    seed: int,
    group_by: str | None = None,
) -> dict[str, Any]:
    """Answer the conversations of `data.train`; return the report: `summarise` and what was evaluated, how.

    Raises:
        UserError: an unknown task, data that cannot be read or that the task is not for.
    """
    task = find_task(task_name)
    if batch_size < 1 or (limit is not None and limit < 1):
        raise UserError(f"--batch-size {batch_size}, --limit {limit}: both must be at least 1.")
    questions = read_questions(data, limit)
    for question in questions:  # a record of another task is refused before minutes are spent on answers
        score(task, question, "", group_by)
    images = replace(found.images, allow_urls=data.allow_urls, max_soft_tokens=data.max_soft_tokens)
    prompts = prompt_ids(questions, found.model.tokenizer, data, images)
    model = load_model(replace(found, images=images))
    began = time.monotonic()
    said = answer_prompts(model, prompts, batch_size, range(seed, seed + len(prompts)))
    seconds = time.monotonic() - began
    scores = [score(task, question, one.text, group_by) for question, one in zip(questions, said, strict=True)]
    return {
        **found.source.named(),
        "data": data.named("train"),
        "task": task_name,
        **summarise(scores),
        "manner": {
            **manner(said, questions, found.model.tokenizer),
            "seconds": seconds,
        },
        "seed": seed,
        "sampler": found.settings.named(),
        "samples": samples(questions, said, scores),
    }


def samples(questions: Sequence[Question], said: Sequence[Said], scores: Sequence[Score]) -> list[dict[str, Any]]:
    """The first answers beside their references, with what they are worth."""
    return [
        {"where": question.where, "reference": question.reference["content"], "answer": one.text, **made.shown()}
        for question, one, made in zip(questions[:SAMPLES], said, scores, strict=False)
    ]


def manner(said: list[Said], questions: Sequence[Question], tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """How the answers came: the share that stops, their length over the references', steps a canvas, tokens a decoder
    pass.
    """
    references = [question.reference["content"] for question in questions]
    wanted = sum(len(ids) for ids in tokenizer(references, add_special_tokens=False)["input_ids"])
    steps = sum(one.answer.steps for one in said)
    tokens = sum(one.tokens for one in said)
    return {
        "stopped": sum(one.answer.stopped for one in said) / max(len(said), 1),
        "length_to_reference": tokens / max(wanted, 1),
        "steps_per_canvas": steps / max(sum(one.answer.canvases for one in said), 1),
        "tokens_per_forward": tokens / max(steps, 1),
    }


def score(task: Task, question: Question, answer: str, group_by: str | None = None) -> Score:
    """What a task makes of an answer, under the groups of the task, or of a column of the row.

    Raises:
        UserError: a row that the task is not for, or without the column.
    """
    try:
        made = task(question, answer)
    except UserError as error:
        raise UserError(f"{question.where}: {error}") from error
    if group_by is None:
        return made
    if group_by in (*made.right, "examples"):
        raise UserError(f"--group-by {group_by}: a measure of the task has that name. Give the column another.")
    if group_by not in question.row:
        raise UserError(f"{question.where}: no column {group_by} to group by; it has: {', '.join(question.row)}.")
    return Score(made.right, {group_by: question.row[group_by]})
