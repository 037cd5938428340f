"""What a row is: one small function a format, chosen by the row's keys or by `data.format`."""

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]  # as chat templates read it: role, content, and where given reasoning_content, tool_calls, ...


class BadRow(Exception):
    """What is wrong with one row; whoever reads rows adds where it is."""


@dataclass(frozen=True)
class Conversation:
    """Turns, and what belongs to all of them."""

    messages: list[Message]
    weights: list[float | None]  # of each message, by the row's own word; None: it says nothing
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Text:
    """Running text, for continued training."""

    text: str
