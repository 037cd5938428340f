"""Images in a row: parts of messages, and a column beside the conversation, before any file is opened.

A message with images has a list as its content, as chat templates read it: `{type: text, text: ...}` and `{type: image,
image: Origin}` in order. Whose image it is, a part says itself, or the row's column `images` (or `image`) does: for the
`<image>` in texts and the parts without an address, in order. Where no text says where, they stand before the first
user's text, as in TRL.
"""

import base64
import binascii
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from ds_dgemma.data.messages import IMAGE_PARTS, BadRow, Message, kind_of
from ds_dgemma.errors import counted

COLUMNS = ("images", "image")
PLACEHOLDER = "<image>"
BESIDE = ("type", "detail", "cache_control", "format")  # say nothing of the picture
LONGEST_NAME = 1024
SHOWN = 120  # characters of an address
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
ADDRESSES = ("image", "path", "url", "image_url")  # keys of a part


class Origin(NamedTuple):
    """Where an image is had from."""

    name: str  # what errors call it
    address: str | bytes  # a path, absolute once its row is placed; an http(s) address; or the file itself


class Unplaced(NamedTuple):
    """Stands for the row's next image."""

    name: str


def _part(part: dict[str, Any], name: str) -> dict[str, Any]:
    """A part of a content, an image's with an `Origin` or `Unplaced`; `name` is the content's.

    Raises:
        BadRow: an image with anything but one address.
    """
    if part["type"] not in IMAGE_PARTS:
        return part
    known = {key: part[key] for key in ADDRESSES if part.get(key) is not None}
    if len(known) > 1:
        raise BadRow(f"{name} has an image with {' and '.join(known)}. Keep one of them.")
    if others := [key for key in part if part[key] and key not in (*ADDRESSES, *BESIDE)]:
        raise BadRow(f"{name} has an image with {others[0]}, which is not read. It has type, and image, path or url.")
    if not known:
        return {"type": "image", "image": Unplaced(name)}
    ((key, value),) = known.items()
    if key == "image_url" and isinstance(value, dict):
        if others := [key for key in value if value[key] and key not in ("url", *BESIDE)]:
            raise BadRow(f"{name}'s image_url has {others[0]}, which is not read. It has url.")
        value = value.get("url")
    return {"type": "image", "image": origin_of(value, f"{name}'s {key}")}


def origin_of(value: Any, name: str) -> Origin:
    """An image as rows give it: an address, `{bytes, path}` as `datasets` has it, or base64 in a data: address."""
    if isinstance(value, dict) and not value.keys() - {"bytes", "path"}:
        if isinstance(value.get("bytes"), str):
            raise BadRow(f"{name} has bytes as a text. Write a path, or data:image/png;base64,...")
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str | bytes) or not value:
        raise BadRow(f"{name} is {kind_of(value) if value != '' else 'empty'}, expected a path, an address or bytes.")
    if isinstance(value, str) and value.startswith("data:"):
        return Origin(name, _decoded(value, name))
    return Origin(name, value)


def _decoded(address: str, name: str) -> bytes:
    head, comma, body = address.partition(",")
    if not comma or not head.endswith(";base64"):
        raise BadRow(f"{name} is a data: address that is not base64: data:image/png;base64,... was expected.")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise BadRow(f"{name} is no base64: {error}.") from error


def take_column(row: dict[str, Any], names: tuple[str, ...] = COLUMNS) -> list[Origin]:
    """Take the images out of a row's own column.

    Raises:
        BadRow: two columns of them, or what is no image.
    """
    given = {key: value for key in names if (value := row.pop(key, None)) not in (None, "", [], {})}
    if len(given) > 1:
        raise BadRow("has image and images. Keep one of them, or name the other in data.ignore to leave it out.")
    for key, value in given.items():
        listed = value if isinstance(value, list) else [value]
        return [origin_of(one, f"{key}[{n}]" if isinstance(value, list) else key) for n, one in enumerate(listed)]
    return []


def place(messages: list[Message], column: list[Origin]) -> tuple[list[Message], bool]:
    """The messages with every image in its part, and whether there are any.

    Raises:
        BadRow: more or fewer places than the row has images.
    """
    if not column and not any(isinstance(message["content"], list) for message in messages):
        return messages, False
    for number, message in enumerate(messages):
        if isinstance(message["content"], list):
            parts = [_part(part, f"messages[{number}]") for part in message["content"]]
            messages = [*messages[:number], {**message, "content": parts}, *messages[number + 1 :]]
    if column:
        messages = [_split(message) for message in messages]
        if not any(image_parts(messages)):
            messages = _before_first_user(messages, len(column))
    if column and (said := next((n for n, m in enumerate(messages) if PLACEHOLDER in _answer(m)), None)) is not None:
        raise BadRow(f"messages[{said}] holds {PLACEHOLDER}, an image's place, though it is the assistant's.")
    waiting = [part for _, part in image_parts(messages) if isinstance(part["image"], Unplaced)]
    if waiting and not column:
        raise BadRow(
            f"{waiting[0]['image'].name} has an image without an address, and the row has no column images beside it. "
            "Give the part image, path or url, or the row the column."
        )
    if len(waiting) != len(column):
        where = waiting[0]["image"].name if waiting else "the row"
        raise BadRow(
            f"{where} has {counted(len(waiting), 'place')} for images, and the row's column has {len(column)}. A place "
            f"is {PLACEHOLDER} in a text, or a part {{type: image}} without an address."
        )
    rest = iter(column)

    def filled(part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "image": next(rest)} if isinstance(part.get("image"), Unplaced) else part

    return [_with(message, filled) for message in messages], True


def placed_in(messages: list[Message], folder: Path) -> list[Message]:
    """The messages with paths from the folder that their row's file is in."""

    def absolute(part: dict[str, Any]) -> dict[str, Any]:
        origin = part.get("image")
        if origin is None or isinstance(origin.address, bytes) or is_url(origin.address):
            return part
        return {**part, "image": origin._replace(address=str(folder / _path(origin)))}

    return [_with(message, absolute) for message in messages]


def _path(origin: Origin) -> Path:
    address = str(origin.address)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", address)
    if address.lower().startswith("file:"):
        parts = urlsplit(address)
        if parts.netloc not in ("", "localhost"):
            raise BadRow(f"{origin.name} is {shortened(address)}, a file of another machine: {parts.netloc}.")
        address = unquote(parts.path)
    elif scheme:
        raise BadRow(
            f"{origin.name} is {shortened(address)}: {scheme[1]}:// is not read. Give a path, file://, data: or, with "
            "data.allow_urls, http(s)://."
        )
    try:
        return Path(address).expanduser()
    except RuntimeError as error:
        raise BadRow(f"{origin.name} is {shortened(address)}: ~ has no meaning here: {error}") from error


def is_url(address: str) -> bool:
    """Whether an image would have to be fetched."""
    return address[:8].lower().startswith(("http://", "https://"))


def shortened(address: str | bytes) -> str:
    """An address for people: a line, and not a whole file."""
    if isinstance(address, bytes):
        return f"{len(address):,} bytes"
    return address if len(address) <= SHOWN else f"{address[:SHOWN]}... ({len(address):,} characters)"


def looks_like_image(value: Any) -> bool:
    """Whether a column's value is an image: as `datasets` has it, or a path; or a list of them."""
    if isinstance(value, list):
        return bool(value) and all(map(looks_like_image, value))
    if isinstance(value, dict):
        return value.keys() == {"bytes", "path"}
    return isinstance(value, str) and len(value) <= LONGEST_NAME and value.lower().endswith(SUFFIXES)


def image_parts(messages: list[Message]) -> Iterator[tuple[Message, dict[str, Any]]]:
    """Every image in order, and whose it is."""
    for message in messages:
        if isinstance(message["content"], list):
            yield from ((message, part) for part in message["content"] if part["type"] == "image")


def origins(messages: list[Message]) -> list[Origin]:
    """Where every image is had from, in order."""
    return [part["image"] for _, part in image_parts(messages)]


def _answer(message: Message) -> str:
    return message["content"] if message["role"] == "assistant" else ""


def _with(message: Message, change: Any) -> Message:
    content = message["content"]
    return {**message, "content": [change(part) for part in content]} if isinstance(content, list) else message


def _split(message: Message) -> Message:
    """A message whose texts are cut at their places for images."""
    content = message["content"]
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    if message["role"] == "assistant" or not any(PLACEHOLDER in part.get("text", "") for part in parts):
        return message
    cut: list[dict[str, Any]] = []
    for part in parts:
        first, *others = part["text"].split(PLACEHOLDER) if part["type"] == "text" else (None,)
        if first is None:
            cut.append(part)
            continue
        pieces: list[dict[str, Any]] = [{"type": "text", "text": first}]
        for text in others:
            pieces += [
                {"type": "image", "image": Unplaced(f"a text of {message['role']}")},
                {"type": "text", "text": text},
            ]
        cut += [piece for piece in pieces if piece["type"] == "image" or piece["text"].strip()]
    return {**message, "content": cut}


def _before_first_user(messages: list[Message], count: int) -> list[Message]:
    first = next((n for n, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise BadRow("has images, and no user whose turn they could stand in.")
    message = messages[first]
    content = message["content"]
    texts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    parts = [{"type": "image", "image": Unplaced("the first user's turn")} for _ in range(count)]
    return [*messages[:first], {**message, "content": [*parts, *texts]}, *messages[first + 1 :]]
