"""What a chat template leaves out: words of the answer, of its context, and tools.

Templates may trim, escape as JSON and reorder; a text counts as rendered where it stands in the rendering with white
space at its ends aside, or all its parts do.
"""

import json
from collections.abc import Iterator
from typing import Any

from ds_dgemma.data.control_tokens import MARKS
from ds_dgemma.data.formats import BadRow, Message

Words = list[tuple[str, str]]  # where they stand in the row, and what they are


def words_of_calls(message: Message, name: str) -> Words:
    """The names and the string arguments of a message's tool calls."""
    words = []
    for number, call in enumerate(message.get("tool_calls") or ()):
        where = f"{name}.tool_calls[{number}].function"
        words.append((f"{where}.name", call["function"]["name"]))
        words += _strings(call["function"].get("arguments"), f"{where}.arguments")
    return words


def check_answer(words: Words, response: str) -> None:
    """Check that what is learned holds the answer's own words.

    Raises:
        BadRow: a part of them is not there.
    """
    for where, text in words:
        if not stands(text, response):
            if where.endswith("reasoning_content"):
                hint = (
                    "This template writes no thought here; it may want enable_thinking or preserve_thinking in "
                    "chat_template_kwargs. Else take the thought out of the row, or change the template."
                )
            elif ".content" in where:
                hint = "A thought goes into the message's reasoning_content. Anything else: change the text."
            else:
                hint = "A template that knows tools is needed, or a row without tool calls."
            raise _left_out(where, text, response, hint)


def check_context(messages: list[Message], tools: list[dict[str, Any]] | None, rendered: str) -> None:
    """Check that a rendering holds the words of all who are no assistant, the calls of all, and the tools' names.

    Thoughts and texts of earlier answers are the template's to leave out; those of learned ones are checked apart.

    Raises:
        BadRow: a part of them is not there.
    """
    for number, message in enumerate(messages):
        role = message["role"]
        if len(message) > 2 and role != "tool" and not stands(message.get("name", ""), rendered):
            hint = "Put the name into the content, or name it in data.ignore to leave it out."
            raise _left_out(f"messages[{number}].name", message["name"], rendered, hint)
        if role != "assistant":
            for text in _texts(message["content"]):
                if text.strip() in rendered or _tool_stands(role, text, rendered):
                    continue
                hint = f"It has no place for role {role}: " + (
                    "change the template, or put this text into the first user's message."
                    if role in ("system", "developer")
                    else "change the template, or the row."
                )
                raise _left_out(f"messages[{number}].content", text, rendered, hint)
        elif len(message) > 2:
            words = words_of_calls(message, f"messages[{number}]")
            for place, response in enumerate(message.get("tool_responses") or ()):
                words += _strings(response, f"messages[{number}].tool_responses[{place}]")
            if message.get("tool_calls") and message["content"]:
                words.append((f"messages[{number}].content", message["content"]))
            for where, text in words:
                if not stands(text, rendered):
                    raise _left_out(where, text, rendered, "A template that knows tools is needed, or another row.")
    for number, tool in enumerate(tools or ()):
        name = tool.get("function", tool).get("name", "")
        if not stands(name, rendered):
            hint = "It does not tell the model of tools: a template that does is needed, or a row without tools."
            raise _left_out(f"tools[{number}]", name, rendered, hint)


def _texts(content: str | list[dict[str, Any]]) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def stands(text: str, rendered: str) -> bool:
    """Whether a text stands in a rendering, plain or escaped as JSON."""
    text = text.strip()
    if text in rendered or json.dumps(text, ensure_ascii=False)[1:-1] in rendered:
        return True
    return not MARKS.search(text) and json.dumps(text)[1:-1] in rendered


def _tool_stands(role: str, text: str, rendered: str) -> bool:
    if stands(text, rendered):
        return True
    if role != "tool":
        return False
    try:  # a template may write a tool's JSON in its own way
        parts = json.loads(text)
    except ValueError:
        return False
    return isinstance(parts, dict | list) and all(stands(part, rendered) for _, part in _strings(parts, ""))


def _strings(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(item, f"{where}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _strings(item, f"{where}[{number}]")


def _left_out(where: str, text: str, rendered: str, hint: str) -> BadRow:
    lines = [line for line in text.split("\n") if line.strip()]
    lost = next((line for line in lines if line.strip() not in rendered), text).strip()
    shown = lost if len(lost) <= 60 else f"{lost[:60]}..."
    return BadRow(f"the chat template leaves out a part of {where}: {shown!r}. {hint}")
