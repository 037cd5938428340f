"""What is asked: the conversations of a source, each without its last answer, which is the reference."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from ds_dgemma.config.data import DataSection
from ds_dgemma.data.chat import Document, tokenize_rows
from ds_dgemma.data.drafter import Drafter
from ds_dgemma.data.findings import settle
from ds_dgemma.data.formats import Conversation, template_kwargs_of, tools_of
from ds_dgemma.data.image_files import ImageFiles
from ds_dgemma.data.messages import BadRow, Message, read_message
from ds_dgemma.data.pictures import place, placed_in, take_column
from ds_dgemma.data.reading import Reading
from ds_dgemma.data.sources import Source, Split, open_sources, read_rows
from ds_dgemma.errors import UserError
from ds_dgemma.evaluation.open_model import Found
from ds_dgemma.evaluation.prompts import message_ids
from ds_dgemma.evaluation.sampler import Prompt


@dataclass(frozen=True)
class Question:
    """A conversation whose last answer is wanted."""

    where: str
    row: dict[str, Any]  # as it stands in its file
    prompt: list[Message]
    reference: Message
    conversation: Conversation


def read_questions(data: DataSection, limit: int | None, split: Split = "train") -> list[Question]:
    """The first conversations of a split, whose columns are mapped as training maps them.

    Raises:
        UserError: a file that cannot be read, bad rows, or running text.
    """
    found: list[Question] = []
    for source in open_sources(data, split):
        found += _read(source, None if limit is None else limit - len(found), split)
    return found


def _read(source: Source, limit: int | None, split: Split) -> list[Question]:
    found, reading = [], Reading()
    for chunk in source.chunks() if limit != 0 else ():
        records = dict(chunk.rows())
        for row, read in read_rows(chunk, source, reading):
            if not isinstance(read, Conversation):
                raise UserError(f"{source.where(row)}: a text has no answer to compare with. Give conversations.")
            record = records[row]
            assert not isinstance(record, BadRow)  # it was read
            *prompt, reference = read.messages
            found.append(Question(source.where(row), record, prompt, reference, read))
        if limit is not None and len(found) >= limit:
            break
    settle([(source, reading)], split)
    return found[:limit]


def prompt_ids(
    questions: list[Question], tokenizer: PreTrainedTokenizerFast, data: DataSection, images: ImageFiles
) -> list[Prompt]:
    """What is put before the answers, token for token as training has it.

    Raises:
        UserError: a conversation that training would refuse.
    """
    drafter = Drafter(tokenizer, "last", data.control_tokens, data.chat_template_kwargs, images, data.ignore)
    prompts = []
    for made in tokenize_rows([(n, question.conversation) for n, question in enumerate(questions)], drafter):
        if not isinstance(made, Document):
            row, problem = made
            raise UserError(f"{questions[row].where}: {problem}")
        start = made.spans[-1].start
        prompts.append(Prompt(made.ids[:start], made.images))
    return prompts


MADE = {"answer", "stopped", "steps"}  # what `ds-dgemma generate` adds to a row


def read_prompts(file: Path, found: Found) -> tuple[list[dict[str, Any]], list[Prompt]]:
    """The rows of a JSONL file, and the prompts in them: `prompt` (text), or `messages` that end with the user or a
    tool; with the row's `tools` and `chat_template_kwargs`.

    Raises:
        UserError: a row without a prompt, or that the template does not render.
    """
    (source,) = open_sources(section_of(str(file), {}), "train")
    rows, ids = [], []
    for row, record in source.stream():
        where = source.where(row)
        if isinstance(record, BadRow):
            raise UserError(f"{where}: {record}")
        if taken := MADE & record.keys():
            raise UserError(f"{where}: {', '.join(sorted(taken))} would be written over. Rename it.")
        prompt = record.get("messages", record.get("prompt"))
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not messages or not isinstance(messages, list):
            raise UserError(f"{where}: no prompt (a text) or messages (a list) in it; it has: {', '.join(record)}.")
        try:
            read = [read_message(turn, f"messages[{number}]")[0] for number, turn in enumerate(messages)]
            rest = dict(record)
            read = placed_in(place(read, take_column(rest))[0], source.folder(row))
            tools, variables = tools_of(rest), template_kwargs_of(rest)
        except BadRow as problem:
            raise UserError(f"{where}: {problem}") from problem
        if read[-1]["role"] == "assistant":
            raise UserError(f"{where}: it ends with an answer already. End it with the user.")
        rows.append(record)
        ids.append(message_ids(found, read, where, tools, variables))
    return rows, ids


def section_of(path: str, settings: dict[str, Any]) -> DataSection:
    """`path` as a data section, with settings by their names in it."""
    given = {key: value for key, value in settings.items() if value}
    return DataSection.model_validate({"train": path, **given})
