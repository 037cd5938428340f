"""What a row is: one small function a format, chosen by the row's keys or by `data.format`.

A format takes (pops) what it reads out of the row. What is left over is looked at afterwards: keys that carry words or
decide what is learned make the row refused, the others are named as not read. So nothing is dropped in silence.
`data.ignore` names keys that are left out on purpose, of a row and of its messages. Null counts as absent.

A new format: a function here, its name in FORMATS and in `config/data.py` (FormatName), the keys that tell it in
TOLD_BY, an example file in ds_configs/examples/, a test.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from ds_dgemma.config.data import ColumnsSection, FormatName
from ds_dgemma.data.columns import Row, list_columns, map_columns
from ds_dgemma.data.deciding import decides, is_setting, listed, says, unwanted
from ds_dgemma.data.messages import (
    IMAGES,
    MEDIA,
    MISPLACED,
    TEXT_ONLY,
    WEIGHTS,
    BadRow,
    Message,
    check_order,
    check_text,
    is_plain,
    keys_not_read,
    kind_of,
    link_answers,
    parsed,
    read_message,
    weight_of,
    words_of,
)
from ds_dgemma.data.pictures import COLUMNS, Origin, looks_like_image, place, take_column
from ds_dgemma.data.turns import IGNORE, Turns, history_of, list_of, pair_of, said, string, turn_list, with_system

SYSTEM = ("system", "system_prompt")
TOOLS = ("tools", "functions")
# Keys that carry words, or decide what a prompt or an answer is: a format reads them, or the row is refused
WORDS = listed(
    "messages conversations conversation dialogue dialog history system system_prompt system_message documents "
    "instruction instructions input context prompt question query problem "
    "completion answer response output solution text chosen rejected reasoning reasoning_content thinking thought "
    "tools functions tool_calls function_call tool_responses tool_choice response_format "
    "chat_template chat_template_kwargs enable_thinking"
)
NO_TURNS = frozenset((*TOOLS, *COLUMNS))
OF_ALL_TURNS = frozenset((*SYSTEM, *TOOLS, *WEIGHTS, "chat_template_kwargs"))
TEMPLATE_ARGUMENTS = frozenset(
    ("messages", "conversation", "tools", "tokenize", "add_generation_prompt", "continue_final_message")
)

SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
    "developer": "developer",
}


class Conversation(NamedTuple):
    """Turns, and what belongs to all of them."""

    messages: list[Message]
    weights: list[float | None]  # of each message, by the row's own word; None: it says nothing
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = {}  # noqa: RUF012  (no one changes it)
    has_images: bool = False


@dataclass(frozen=True)
class Text:
    """Running text, for continued training."""

    text: str


@dataclass(frozen=True)
class Layout:
    """How the rows of a source are read: `data.format`, `data.columns` and `data.ignore`."""

    format: FormatName = "auto"
    columns: ColumnsSection | None = None
    ignore: frozenset[str] = frozenset()

    @property
    def named(self) -> frozenset[str]:
        """Keys that the config names and no row must have, so that a misspelt one is told."""
        images = self.columns.images if self.columns else None
        return self.ignore if images is None else self.ignore | {images}


def read_row(record: dict[str, Any], layout: Layout) -> tuple[Conversation | Text, list[str]]:
    """Read a row; return it and the keys that were not read and are not empty.

    Raises:
        BadRow: what is wrong with it.
    """
    row = _without(record, layout.ignore) if layout.ignore else dict(record)
    column: list[Origin] = []
    named = layout.columns.images if layout.columns is not None else None
    if named is not None:
        column = take_column(row, (named,))
    if not MEDIA.isdisjoint(row):
        column = column or take_column(row)
        for key in MEDIA & row.keys():
            if row[key]:
                raise BadRow(f"has {key}. {MISPLACED if key in IMAGES else TEXT_ONLY}")
    if layout.columns is not None:
        name = "data.columns"
        read = _conversation(row, map_columns(row, layout.columns), reads_system=False)
    else:
        name = layout.format
        if name == "auto":
            name = _told_format(tuple([key for key, value in row.items() if value is not None]), tuple(record))
        else:
            _demand(row, name)
        read = FORMATS[name](row)
    if isinstance(read, Conversation):
        messages, has_images = place(read.messages, column)
        read = read._replace(messages=messages, has_images=has_images) if has_images else read
    elif column:
        raise BadRow(f"{column[0].name} stands beside running text, which has no place for it. Give a conversation.")
    unread = _left_over(row, read, name) if row else []
    for key in record:
        if key in row or key in layout.ignore or key in NO_TURNS or key == named:
            continue
        unread += [f"{name} of {key}" for name in sorted(keys_not_read(record[key]) - layout.ignore)]
    return read, unread


def messages(row: Row) -> Conversation:
    """OpenAI's: `messages` of {role, content}, with `tools`, `tool_calls`, thoughts and weights."""
    turns = turn_list(row.pop("messages"), "messages")
    if all(map(is_plain, turns)):
        if OF_ALL_TURNS.isdisjoint(row):  # as of most rows
            check_order([turn["role"] for turn in turns])
            return Conversation(turns, [None] * len(turns))
        return _conversation(row, [(turn, None) for turn in turns])
    return _conversation(row, [read_message(turn, f"messages[{n}]") for n, turn in enumerate(turns)])


def sharegpt(row: Row) -> Conversation:
    """ShareGPT's: `conversations` of {from, value}; a function_call's value is JSON of {name, arguments}."""
    turns = turn_list(row.pop("conversations"), "conversations")
    return _conversation(row, [_sharegpt_turn(turn, f"conversations[{n}]") for n, turn in enumerate(turns)])


def alpaca(row: Row) -> Conversation:
    """Alpaca's: the prompt is `instruction`, a newline and `input`, as LLaMA-Factory joins them; the answer `output`.

    `history` is a list of earlier [user, assistant] pairs.
    """
    parts = [string(row.pop(key, None) or "", key) for key in ("instruction", "input")]
    prompt, output = "\n".join(filter(None, parts)), row.pop("output")
    earlier = history_of(row.pop("history", None), "history")
    return _conversation(row, [*earlier, said("user", prompt, "instruction"), said("assistant", output, "output")])


def prompt_completion(row: Row) -> Conversation:
    """TRL's: `prompt` and `completion` (or `response`), texts or lists of messages. The prompt's answers have weight 0,
    where they say nothing themselves.
    """
    if row.get("label") in (0, "0") or says(row.get("label")) is False:
        raise BadRow(f"label is false: the completion is one that is not wanted. Leave the row out, {IGNORE} (label).")
    key = "completion" if row.get("completion") is not None else "response"
    return _conversation(row, pair_of(row.pop("prompt"), row.pop(key), "prompt", key))


def text(row: Row) -> Text:
    """Running text for continued training: `text`."""
    words = string(row.pop("text"), "text")
    if not words.strip():
        raise BadRow("text is empty: nothing to learn.")
    check_text(words, "text")
    if weight_of(row, "the row") not in (None, 1.0):
        raise BadRow(
            "has a weight other than 1, but running text counts whole. Leave it out; how often a source comes is its "
            "entry's weight in data.train. If it means something else, name it in data.ignore."
        )
    return Text(words)


FORMATS: dict[str, Callable[[Row], Conversation | Text]] = {
    "messages": messages,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "prompt_completion": prompt_completion,
    "text": text,
}
# The keys a format is told by, each with its other names
TOLD_BY: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "sharegpt": (("conversations",),),
    "alpaca": (("instruction",), ("output",)),
    "prompt_completion": (("prompt",), ("completion", "response")),
    "text": (("text",),),
}


def _without(record: dict[str, Any], ignore: Collection[str]) -> Row:
    """Leave out ignored keys, of the messages too; declarations of tools are no messages."""
    row = {key: value for key, value in record.items() if key not in ignore}
    for key, value in row.items():
        if isinstance(value, list) and key not in TOOLS:
            row[key] = [
                {name: item[name] for name in item if name not in ignore} if isinstance(item, dict) else item
                for item in value
            ]
    return row


@lru_cache  # a source's rows have few sets of keys
def _told_format(keys: tuple[str, ...], all_keys: tuple[str, ...]) -> str:
    told = [name for name, needed in TOLD_BY.items() if all(not set(names).isdisjoint(keys) for names in needed)]
    if len(told) == 1:
        return told[0]
    has = ", ".join(keys) or "none"
    if all_keys and not keys:
        raise BadRow(f"all its columns are null: {', '.join(all_keys)}.")
    if told:
        raise BadRow(
            f"may be read as {' or as '.join(told)}; the columns are: {has}. Say which with data.format, and name the "
            "columns that are left out in data.ignore."
        )
    raise BadRow(
        f"no column messages, nor those of another format; the columns are: {has}. Other columns are mapped with "
        "data.columns.prompt and data.columns.response."
    )


def _demand(row: Row, name: str) -> None:
    for names in TOLD_BY[name]:
        if all(row.get(key) is None for key in names):
            if found := [key for key in names if key in row]:
                raise BadRow(f"{found[0]} is null; data.format {name} needs it.")
            raise BadRow(f"no column {' or '.join(names)}, which data.format {name} needs; {list_columns(row)}")


def _sharegpt_turn(turn: Any, name: str) -> tuple[Message, float | None]:
    if not isinstance(turn, dict) or "from" not in turn:
        return read_message(turn, name)
    turn = dict(turn)
    author = turn.pop("from")
    if "value" not in turn:
        raise BadRow(f"{name} has no value; its keys are: from, {', '.join(turn)}.".replace(", .", "."))
    value = turn.pop("value")
    for key, other, said_already in (("value", "content", value), ("from", "role", SHAREGPT_ROLES.get(str(author)))):
        if turn.get(other) not in (None, "", said_already, author):
            raise BadRow(f"{name} has {key} and another {other}. Keep one of them.")
    if author == "function_call":
        calls = parsed(value, f"{name}.value", "{[")
        if not isinstance(calls, list | dict):
            raise BadRow(f"{name}.value is {kind_of(value)}, expected JSON of {{name, arguments}}.")
        turn |= {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}
        return read_message(turn, name)
    if not isinstance(author, str) or author not in SHAREGPT_ROLES:
        known = ", ".join([*SHAREGPT_ROLES, "function_call"])
        raise BadRow(f"{name} is from {author!r}, expected one of {known}.")
    turn |= {"role": SHAREGPT_ROLES[author], "content": value}
    return read_message(turn, name, content_name=f"{name}.value")


def _conversation(row: Row, turns: Turns, reads_system: bool = True) -> Conversation:
    """Join turns with what the row says of all of them: system, tools, variables of the template, a weight."""
    roles = [turn["role"] for turn, _ in turns]
    check_order(roles)
    if "tool" in roles:
        link_answers([turn for turn, _ in turns])
    if OF_ALL_TURNS.isdisjoint(row):
        return Conversation([turn for turn, _ in turns], [weight for _, weight in turns])
    if reads_system:
        for key in SYSTEM:
            if words := row.pop(key, None):
                turns = with_system(turns, string(words, key))
    weight = weight_of(row, "the row")
    if weight is not None:
        turns = [(turn, weight if own is None and turn["role"] == "assistant" else own) for turn, own in turns]
    told, weights = map(list, zip(*turns, strict=True))
    return Conversation(told, weights, tools_of(row), template_kwargs_of(row))


def tools_of(row: Row) -> list[dict[str, Any]] | None:
    """Take the declarations of tools out of a row; None where it has none."""
    declared = [
        [_tool(tool, f"{key}[{n}]") for n, tool in enumerate(list_of(value, key))]
        for key in TOOLS
        if (value := row.pop(key, None))
    ]
    if len(declared) == 2 and declared[0] != declared[1]:
        raise BadRow("tools and functions declare different things. Keep one of them.")
    return (declared[0] or None) if declared else None


def _tool(tool: Any, name: str) -> dict[str, Any]:
    tool = parsed(tool, name, "{")
    if not isinstance(tool, dict):
        raise BadRow(f"{name} is {kind_of(tool)}, expected an object that declares a function.")
    if "function" not in tool:
        if "name" not in tool or tool.get("type", "function") != "function":
            raise BadRow(f"{name} has no function; its keys are: {', '.join(tool) or 'none'}.")
        tool = {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
    function = parsed(tool["function"], f"{name}.function", "{")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRow(f"{name}.function has no name: an object with name, description and parameters was expected.")
    for key in ("input_schema", "inputSchema"):
        if function.get(key):
            raise BadRow(f"{name}.function has {key}, which chat templates do not show. Call it parameters.")
    if isinstance(function.get("parameters"), str):
        function = function | {"parameters": parsed(function["parameters"], f"{name}.function.parameters", "{")}
    if not isinstance(function.get("parameters", {}), dict | None):
        raise BadRow(f"{name}.function.parameters is {kind_of(function['parameters'])}, expected an object.")
    check_text(tool, name)
    return {"type": "function"} | tool | {"function": function}


def template_kwargs_of(row: Row) -> dict[str, Any]:
    """Take a row's own variables of the chat template out of it."""
    given = parsed(row.pop("chat_template_kwargs", None) or {}, "chat_template_kwargs", "{")
    if not isinstance(given, dict):
        raise BadRow(f"chat_template_kwargs is {kind_of(given)}, expected an object.")
    if taken := sorted(TEMPLATE_ARGUMENTS & given.keys()):
        raise BadRow(f"chat_template_kwargs has {taken[0]}, which is no variable of one's own for a template.")
    return given


def _left_over(row: Row, read: Conversation | Text, name: str) -> list[str]:
    """The keys that no one read; refuse those that carry words or decide what is learned."""
    unread = [key for key, value in row.items() if value not in (None, "", [], {}) and key != "id"]
    for key in unread:
        if key in WORDS and not _stands_in(row[key], read):
            raise BadRow(f"has {key}, which {name} does not read. {_way_out(key, name)}")
        if looks_like_image(row[key]):
            way = "Name it in data.columns.images" if name == "data.columns" else "Call it image"
            raise BadRow(f"has {key}, an image that {name} does not read. {way}, {IGNORE}.")
        if unwanted(key, row[key]):
            raise BadRow(f"has {key} {row[key]!r}: the row says that it is not wanted. Leave it out, {IGNORE} ({key}).")
        if is_setting(row[key]) and decides(key):
            raise BadRow(
                f"has {key}, which may say what is learned and is not known. Write weight (0 to 1) on each answer, "
                f"{IGNORE}."
            )
    return unread


def _stands_in(value: Any, read: Conversation | Text) -> bool:
    """Whether the words are those of a message: then they are not lost."""
    if not isinstance(value, str) or isinstance(read, Text):
        return False
    return any(value.strip() == words_of(message["content"]).strip() for message in read.messages)


def _way_out(key: str, name: str) -> str:
    if name == "data.columns":
        place = {"system": "system", "system_prompt": "system", "history": "history"}.get(key)
        template = f"a template in data.columns, such as prompt: '{{question}} {{{key}}}'"
        return f"Map it with {f'data.columns.{place}' if place else template}, {IGNORE}."
    if key == "enable_thinking":
        return f"Put it into chat_template_kwargs, {IGNORE}."
    if key in ("chosen", "rejected"):
        return f"Preferences are not learned: choose an answer, {IGNORE}."
    return f"Put it into a message, map it with data.columns, {IGNORE}."
