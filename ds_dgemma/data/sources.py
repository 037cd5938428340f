"""Conversations from a JSONL file or a hub dataset, every row checked before training starts.

A row is `{"messages": [{"role": ..., "content": ...}, ...]}` with roles system, user, assistant and an
assistant's turn last; or any record of which `data.columns` names the user's and the assistant's column. An `id` is
not needed, but two rows of a file may not share one. A file stays on disk: what is held is its byte offsets (16 bytes
a row), so millions of rows cost megabytes.
Lines end at a newline byte only: U+2028 inside a string is text.
"""

import hashlib
import json
from array import array
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ds_dgemma.config import ColumnsSection, DataSection
from ds_dgemma.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

ROLES = ("system", "user", "assistant")
SHOWN_PROBLEMS = 10
ARRAY_HINT = " A JSON array becomes JSONL with: jq -c '.[]'"
FILE_SUFFIXES = (".jsonl", ".json")
# message keys that chat templates render: leaving one out would silently train on another conversation
UNSUPPORTED_KEYS = ("tool_calls", "reasoning", "reasoning_content", "thinking")
# parts of a content, and columns beside the conversation: training on the text alone would teach to answer blindly
MEDIA = tuple(kind + ending for kind in ("image", "video", "audio") for ending in ("", "s", "_url"))
TEXT_ONLY = "Images, video and audio are not trained on yet: leave this row out, or put what it shows into the text."

Message = dict[str, str]  # role, content


class _BadRow(Exception):
    """What is wrong with one row; `_check_all` adds where it is."""


class JsonlRows:
    """The objects of a JSONL file, read when asked for; blank lines are skipped."""

    def __init__(self, path: Path, spelled: str):
        self.path = path
        self.spelled = spelled
        self._starts, self._lines = array("q"), array("q")
        digest = hashlib.blake2b(digest_size=16)
        start = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    self._starts.append(start)
                    self._lines.append(number)
                digest.update(line)
                start += len(line)
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, row: int) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(self._starts[row])
            return _parse(file.readline())

    def where(self, row: int) -> str:
        """Return file:line."""
        return f"{self.spelled}:{self._lines[row]}"


@dataclass(frozen=True)
class Conversations:
    """Checked conversations, read when asked for."""

    name: str  # as the config spells it
    rows: "JsonlRows | Dataset"
    columns: ColumnsSection | None
    digest: str  # of the content: equal digests, equal conversations
    image_tokens: Collection[str] = ()  # what stands for an image in the model's text

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> list[Message]:
        return self.read(self.rows[row])

    def read(self, record: dict[str, Any]) -> list[Message]:
        """The conversation of a row."""
        messages = _messages(record, self.columns)
        for turn, message in enumerate(messages):
            for token in self.image_tokens:
                if token in message["content"]:
                    raise _BadRow(f"messages[{turn}].content holds {token}, which stands for an image. {TEXT_ONLY}")
        return messages

    def where(self, row: int) -> str:
        """Say where a row is, for a message to the user."""
        return self.rows.where(row) if isinstance(self.rows, JsonlRows) else f"{self.name} row {row}"


def load_conversations(
    data: DataSection, split: Literal["train", "validation"], image_tokens: Collection[str] = ()
) -> Conversations:
    """Open `data.train` or `data.validation` and check every row; one `UserError` tells all that is wrong."""
    source = getattr(data, split)
    if source is None:
        raise UserError(f"data.{split} is not set: give a JSONL file or a hub dataset id.")
    if _is_file(source):
        rows = _open_jsonl(source, split)
        conversations = Conversations(source, rows, data.columns, _keyed(rows.digest, data.columns))
    else:
        hub_split = data.train_split if split == "train" else data.validation_split
        dataset = _load_hub(source, data.hub_config, hub_split, split)
        name = f"{source} [{hub_split}]"
        conversations = conversations_of_dataset(dataset, name, data.columns)
    conversations = replace(conversations, image_tokens=image_tokens)
    _check_all(conversations, split)
    return conversations


def conversations_of_dataset(dataset: "Dataset", name: str, columns: ColumnsSection | None) -> Conversations:
    """Keep the columns that are read: the others are never decoded.

    Raises:
        UserError: a column is missing, or one of images, video or audio is there.
    """
    if media := [column for column in dataset.column_names if column in MEDIA]:
        raise UserError(f"{name} has a column {media[0]}. {TEXT_ONLY} If the text stands alone, save that as JSONL.")
    used = ["messages"] if columns is None else [columns.prompt, columns.response]
    for column in used:
        if column not in dataset.column_names:
            raise UserError(f"{name}: {_missing_column(column, dataset.column_names, columns)}")
    digest = dataset._fingerprint  # what `datasets` keys its own caches with
    return Conversations(name, dataset.select_columns(used), columns, _keyed(digest, columns))


def _keyed(digest: str, columns: ColumnsSection | None) -> str:
    return f"{digest}/{columns.model_dump_json() if columns else 'messages'}"


def _is_file(source: str) -> bool:
    looks_like_path = source.startswith(("/", "./", "../", "~")) or source.endswith(FILE_SUFFIXES)
    return looks_like_path or Path(source).exists()


def _open_jsonl(source: str, split: str) -> JsonlRows:
    path = Path(source).expanduser()
    if not path.exists():
        near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        guess = did_you_mean(path.name, near)
        raise UserError(f"data.{split}: no file {source} (looked in {path.parent.resolve()}).{guess}")
    if path.is_dir():
        raise UserError(f"data.{split}: {source} is a folder; give one JSONL file or a hub dataset id.")
    try:
        rows = JsonlRows(path, source)
    except OSError as error:
        raise UserError(f"data.{split}: cannot read {source}: {error.strerror}.") from error
    if not rows:
        raise UserError(f"data.{split}: {source} is empty: no line holds a conversation.")
    return rows


def _load_hub(source: str, config: str | None, hub_split: str, split: str) -> "Dataset":
    import datasets  # here, for it takes seconds that a local file need not pay
    from datasets.exceptions import DatasetsError

    try:
        dataset = datasets.load_dataset(source, config, split=hub_split)
    except (DatasetsError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"data.{split}: no local file {source}, and the hub dataset of that id "
            f"(data.hub_config {config}, split {hub_split}) cannot be loaded: {reason}"
        ) from error
    assert isinstance(dataset, datasets.Dataset)  # a split was named and streaming is off
    if not len(dataset):
        raise UserError(f"data.{split}: {source} has no rows in split {hub_split}.")
    return dataset


def _check_all(conversations: Conversations, split: str) -> None:
    """Read every row once; raise the first problems and their number."""
    problems, count, named = [], 0, {}
    for row in range(len(conversations)):
        try:
            record = conversations.rows[row]
            conversations.read(record)
            if (name := record.get("id")) is not None and named.setdefault(str(name), row) != row:
                raise _BadRow(
                    f"id {name!r} is that of {conversations.where(named[str(name)])} too. Leave one of them out; if "
                    "both are meant, give them ids of their own, or none."
                )
        except _BadRow as problem:
            count += 1
            if count <= SHOWN_PROBLEMS:
                problems.append(f"  {conversations.where(row)}: {problem}")
    if not count:
        return
    rows = f"{count} bad {'row' if count == 1 else 'rows'} of {len(conversations)}"
    shown = f" (the first {SHOWN_PROBLEMS})" if count > SHOWN_PROBLEMS else ""
    raise UserError("\n".join([f"{rows} in data.{split} = {conversations.name}{shown}", *problems]))


def _parse(line: bytes) -> dict[str, Any]:
    if b"\0" in line:
        raise _BadRow(f"a NUL byte at byte {line.index(0) + 1} of the line: the file is damaged or binary.")
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _BadRow(f"not UTF-8: {error.reason} at byte {error.start + 1} of the line.") from error
    except json.JSONDecodeError as error:
        near = error.doc[max(0, error.pos - 20) : error.pos + 20].strip()
        hint = ARRAY_HINT if error.doc.lstrip().startswith("[") else ""
        raise _BadRow(f"broken JSON: {error.msg} at column {error.colno}: {near!r}.{hint}") from error
    except (ValueError, RecursionError) as error:  # an endless number, a thousand nested lists
        raise _BadRow(f"broken JSON: {error}") from error
    if isinstance(record, list):
        raise _BadRow(f"a list, expected one object a line.{ARRAY_HINT}")
    if not isinstance(record, dict):
        raise _BadRow(f"{_kind(record)}, expected an object with messages.")
    return record


def _messages(record: dict[str, Any], columns: ColumnsSection | None) -> list[Message]:
    """Return a record's conversation, or raise `_BadRow` with what is wrong."""
    for key in MEDIA:
        if record.get(key):
            raise _BadRow(f"has {key}. {TEXT_ONLY}")
    if columns is not None:
        for column in (columns.prompt, columns.response):
            if column not in record:
                raise _BadRow(_missing_column(column, record, columns))
        turns = {"user": record[columns.prompt], "assistant": record[columns.response]}
        names = {"user": f"column {columns.prompt}", "assistant": f"column {columns.response}"}
        return [_message(role, content, names[role]) for role, content in turns.items()]
    if "messages" not in record:
        raise _BadRow(_missing_column("messages", record, None))
    messages = record["messages"]
    if not isinstance(messages, list):
        raise _BadRow(f"messages is {_kind(messages)}, expected a list of {{role, content}}.")
    if not messages:
        raise _BadRow("messages is empty: nothing to learn.")
    checked = [_checked_message(message, f"messages[{turn}]") for turn, message in enumerate(messages)]
    _check_turns([message["role"] for message in checked])
    return checked


def _missing_column(column: str, existing: Collection[str], columns: ColumnsSection | None) -> str:
    has = ", ".join(existing) or "none"
    map_columns = " Other columns are mapped with data.columns.prompt and data.columns.response."
    hint = map_columns if columns is None else did_you_mean(column, existing)
    return f"no column {column}; the columns are: {has}.{hint}"


def _checked_message(message: Any, name: str) -> Message:
    if not isinstance(message, dict):
        raise _BadRow(f"{name} is {_kind(message)}, expected an object with role and content.")
    for key in ("role", "content"):
        if key not in message:
            raise _BadRow(f"{name} has no {key}; its keys are: {', '.join(message) or 'none'}.")
    for key in UNSUPPORTED_KEYS:
        if message.get(key):
            raise _BadRow(f"{name} has {key}, which is not supported: only role and content are rendered.")
    role = message["role"]
    if role not in ROLES:
        hint = " Use assistant." if role == "model" else ""
        raise _BadRow(f"{name} has role {role!r}, expected one of {', '.join(ROLES)}.{hint}")
    return _message(role, message["content"], f"{name}.content")


def _message(role: str, content: Any, name: str) -> Message:
    text = _text(content, name)
    if role == "assistant" and not text.strip():
        raise _BadRow(f"{name} is empty, though it is the assistant's: nothing to learn.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _BadRow(f"{name} holds half a surrogate pair at character {error.start}: not text.") from error
    return {"role": role, "content": text}


def _text(content: Any, name: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _BadRow(f"{name} is {_kind(content)}, expected a string.")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else _kind(part)
        if kind in MEDIA:
            raise _BadRow(f"{name} has a part of type {kind}. {TEXT_ONLY}")
        if kind != "text" or not isinstance(part.get("text"), str):
            raise _BadRow(f"{name} has a part of type {kind}, only text was expected.")
        parts.append(part["text"])
    return "".join(parts)


def _check_turns(roles: list[str]) -> None:
    if "assistant" not in roles:
        raise _BadRow("no assistant turn: nothing to learn.")
    if roles[-1] != "assistant":
        raise _BadRow(f"the last message is from {roles[-1]}: nothing to learn after it. End with the assistant.")
    if "user" not in roles[: roles.index("assistant")]:
        raise _BadRow("the assistant's turn has no user turn before it.")


def _kind(value: Any) -> str:
    kinds = {str: "a string", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    return kinds.get(type(value), "a list" if isinstance(value, list) else "an object")
