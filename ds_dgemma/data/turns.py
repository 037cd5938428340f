"""Turns of a conversation from what a row's columns hold: texts, messages, pairs."""

from typing import Any

from ds_dgemma.data.messages import BadRow, Message, kind_of, parsed, read_message, words_of

Turns = list[tuple[Message, float | None]]  # each with what the row says that it counts for
IGNORE = "or name it in data.ignore to leave it out"


def pair_of(prompt: Any, completion: Any, prompt_name: str, completion_name: str) -> Turns:
    """A prompt and its completion, each a text or a list of messages."""
    turns = []
    for value, role, name in ((prompt, "user", prompt_name), (completion, "assistant", completion_name)):
        if not _is_messages(value):
            turns.append(said(role, value, name))
            continue
        read = [read_message(turn, f"{name}[{n}]") for n, turn in enumerate(value)]
        if role == "user":
            read = [(turn, 0.0 if own is None and turn["role"] == "assistant" else own) for turn, own in read]
        turns += read
    return turns


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) and "role" in item for item in value)


def said(role: str, content: Any, name: str) -> tuple[Message, None]:
    """A turn of plain content."""
    return read_message({"role": role, "content": content}, name, content_name=name)[0], None


def history_of(pairs: Any, name: str) -> Turns:
    """Earlier turns, a list of [user, assistant]."""
    turns: Turns = []
    for n, pair in enumerate(list_of(pairs, name) if pairs else []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow(f"{name}[{n}] is {kind_of(pair)}, expected a pair [user, assistant].")
        turns += [said(role, words, f"{name}[{n}]") for role, words in zip(("user", "assistant"), pair, strict=True)]
    return turns


def string(value: Any, name: str) -> str:
    """A string, or a refusal."""
    if not isinstance(value, str):
        raise BadRow(f"{name} is {kind_of(value)}, expected a string.")
    return value


def list_of(value: Any, name: str) -> list[Any]:
    """A list, or JSON text of one, which is what a table's cell can hold."""
    value = parsed(value, name, "[")
    if not isinstance(value, list):
        raise BadRow(f"{name} is {kind_of(value)}, expected a list.")
    return value


def turn_list(value: Any, name: str) -> list[Any]:
    """A list of turns that is not empty, or JSON text of one."""
    value = parsed(value, name, "[")
    if not isinstance(value, list):
        raise BadRow(f"{name} is {kind_of(value)}, expected a list of {{role, content}}.")
    if not value:
        raise BadRow(f"{name} is empty: nothing to learn.")
    return value


def with_system(turns: Turns, words: str) -> Turns:
    """Put the row's system text first, where it is not there already."""
    first = turns[0][0]
    if first["role"] not in ("system", "developer"):
        return [said("system", words, "system"), *turns]
    if words_of(first["content"]).strip() != words.strip():
        raise BadRow(
            f"the row's system text is another than that of its first message, which is from {first['role']}. Keep "
            f"one of them, {IGNORE} (system)."
        )
    return turns
