"""One message of a row, checked and brought into the form that chat templates read; and the order of messages.

A message has role, content (a string, "" where there is none; parts where it has images) and, where given,
reasoning_content, tool_calls (arguments an object), tool_responses, tool_call_id, name. Other spellings become these;
whatever else holds words is refused by name.
"""

import json
from typing import Any

from ds_dgemma.data.deciding import DECIDING_OF_A_TURN, decides, listed

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_ROLES = {"function": "tool"}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
WEIGHTS = ("weight", "train", "loss", "trainable", "loss_mask", "loss_weight", "loss_scale", "training", "learn")
ANSWER_ONLY = ("tool_calls", "function_call", "tool_responses", *THOUGHTS)
READ = frozenset(("role", "content", "tool_call_id", "name", *ANSWER_ONLY, *WEIGHTS))
READ_ANYWHERE = READ | {"id", "from", "value"}  # ShareGPT's, and what names a row


# strings that are no words to learn
HARMLESS = listed("id uuid date time timestamp created created_at model finish_reason stop_reason cache_control")
# parts of a content, and columns beside the conversation: training on the text alone would teach to answer blindly
MEDIA = frozenset(
    [kind + ending for kind in ("image", "video", "audio") for ending in ("", "s", "_url", "_urls")] + ["input_audio"]
)
TEXT_ONLY = "Video and audio are not trained on: leave this row out, or put what it shows into the text."
MISPLACED = "An image is a part of a message's content, {type: image, path: ...}, or stands in the row's column images."
IMAGE_PARTS = ("image", "image_url")
IMAGES = frozenset(("image", "images", "image_url", "image_urls"))
EMPTY = (None, "", [], {})
SPEAKERS = frozenset(("system", "user", "assistant"))


class BadRow(Exception):
    """What is wrong with one row; whoever reads rows adds where it is."""


def is_plain(raw: Any) -> bool:
    """Whether a message is nothing but a role and words, as most are: then it is read already."""
    if type(raw) is not dict or len(raw) != 2:
        return False
    role, content = raw.get("role"), raw.get("content")
    if type(role) is not str or type(content) is not str:
        return False
    return role in SPEAKERS and content != "" and not content.isspace() and _is_text(content)


def _is_text(content: str) -> bool:
    """Whether there are no halves of surrogate pairs."""
    try:
        content.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_message(raw: Any, name: str, content_name: str | None = None) -> tuple[Message, float | None]:
    """Return a message and the weight that it gives itself; `name` is what errors call it."""
    if not isinstance(raw, dict):
        raise BadRow(f"{name} is {kind_of(raw)}, expected an object with role and content.")
    role = _role(raw, name)
    content_name = content_name or f"{name}.content"
    _refuse_unknown(raw, READ, name)
    message, weight = _with_extras(raw, role, name, content_name)
    content = message["content"]
    if role == "assistant" and isinstance(content, list):
        raise BadRow(f"{content_name} has an image, though it is the assistant's: answers are text.")
    if role == "assistant" and not content.strip() and not ("tool_calls" in message or "tool_responses" in message):
        if "reasoning_content" in message:
            raise BadRow(f"{name} is an answer that is a thought only: nothing is said. Give it a content.")
        raise BadRow(f"{content_name} is empty, though it is the assistant's: nothing to learn.")
    check_text(words_of(content), content_name)
    return message, weight


def _role(raw: dict[str, Any], name: str) -> str:
    if "role" not in raw:
        raise BadRow(f"{name} has no role; its keys are: {', '.join(raw) or 'none'}.")
    role = raw["role"]
    role = OTHER_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        hint = " Use assistant." if role == "model" else ""
        raise BadRow(f"{name} has role {role!r}, expected one of {', '.join(ROLES)}.{hint}")
    return role


def _with_extras(raw: dict[str, Any], role: str, name: str, content_name: str) -> tuple[Message, float | None]:
    """A message with everything that it may have beside its content."""
    if role != "assistant":
        for key in ANSWER_ONLY:
            if raw.get(key):
                raise BadRow(f"{name} has {key}, though it is from {role}: only the assistant's may.")
    calls, responses, thought = _calls(raw, name), _responses(raw, name), _thought(raw, name)
    if raw.get("content") is None and not (calls or responses or thought):
        if "content" not in raw:
            raise BadRow(f"{name} has no content; its keys are: {', '.join(raw)}.")
        raise BadRow(f"{content_name} is null, expected a string.")
    content = raw.get("content")
    message: Message = {"role": role, "content": "" if content is None else _content(content, content_name)}
    extras = {"reasoning_content": thought, "tool_calls": calls, "tool_responses": responses}
    message |= {key: value for key, value in extras.items() if value}
    for key in ("tool_call_id", "name"):
        if value := raw.get(key):
            if not isinstance(value, str):
                raise BadRow(f"{name}.{key} is {kind_of(value)}, expected a string.")
            check_text(value, f"{name}.{key}")
            message[key] = value
    weight = weight_of(dict(raw), name)
    if weight and role != "assistant":
        raise BadRow(f"{name} is from {role} and has a weight of {weight:g}: only answers are learned. Leave it out.")
    return message, weight if role == "assistant" else None


def _refuse_unknown(raw: dict[str, Any], known: frozenset[str], name: str) -> None:
    """Refuse keys that hold words or may say what is learned, and that no one reads."""
    for key in raw.keys() - known - HARMLESS:
        value = raw[key]
        if value in EMPTY:
            continue
        if key in MEDIA:
            raise BadRow(f"{name} has {key}. {MISPLACED if key in IMAGES else TEXT_ONLY}")
        if decides(key, DECIDING_OF_A_TURN):
            raise BadRow(
                f"{name} has {key}, which may say what is learned and is not known. Write weight (0 to 1) on each "
                "answer, or name it in data.ignore to leave it out."
            )
        if isinstance(value, str | list | dict):
            raise BadRow(
                f"{name} has {key}, which is not read. Put its words into the content, or name it in data.ignore to "
                "leave it out."
            )


def keys_not_read(turns: Any) -> set[str]:
    """The keys of messages that were let through and that no one reads."""
    if not isinstance(turns, list):
        return set()
    objects = [turn for turn in turns if isinstance(turn, dict) and not turn.keys() <= READ_ANYWHERE]
    return {key for turn in objects for key, value in turn.items() if key not in READ_ANYWHERE and value not in EMPTY}


def names_within(value: Any, names: frozenset[str]) -> frozenset[str]:
    """Which of some names an object, or one within it, has as a key."""
    if isinstance(value, dict):
        return (names & value.keys()).union(*(names_within(item, names) for item in value.values()))
    if isinstance(value, list):
        return frozenset().union(*(names_within(item, names) for item in value))
    return frozenset()


def words_of(content: str | list[dict[str, Any]]) -> str:
    """The words of a content, images left out."""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def _content(content: Any, name: str) -> str | list[dict[str, Any]]:
    """A text; or, where it has images, a list of parts, which `pictures.py` reads on."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRow(f"{name} is {kind_of(content)}, expected a string.")
    if any(isinstance(part, dict) and "role" in part for part in content):
        raise BadRow(f"{name} is a list of messages, expected a string.")
    for part in content:
        if not isinstance(part, dict):
            raise BadRow(f"{name} has a part that is {kind_of(part)}, expected {{type: text, text: ...}}.")
        kind = str(part.get("type"))
        if kind in IMAGE_PARTS:
            continue
        if kind in MEDIA:
            raise BadRow(f"{name} has a part of type {kind}. {TEXT_ONLY}")
        if kind != "text" or not isinstance(part.get("text"), str):
            raise BadRow(f"{name} has a part of type {kind}, only text and image were expected.")
        _refuse_unknown(part, frozenset(("type", "text")), f"a part of {name}")
    return content if any(part["type"] in IMAGE_PARTS for part in content) else words_of(content)


def _thought(raw: dict[str, Any], name: str) -> str | None:
    given = {key: raw[key] for key in THOUGHTS if raw.get(key)}
    for key, value in given.items():
        if not isinstance(value, str):
            raise BadRow(f"{name}.{key} is {kind_of(value)}, expected a string.")
        check_text(value, f"{name}.{key}")
    if len(set(given.values())) > 1:
        raise BadRow(f"{name} has {' and '.join(given)} with different words. Keep one of them.")
    thought = next(iter(given.values()), None)
    return thought if thought and thought.strip() else None


def _calls(raw: dict[str, Any], name: str) -> list[dict[str, Any]]:
    calls = parsed(raw.get("tool_calls"), f"{name}.tool_calls", "[") or []
    if not isinstance(calls, list):
        raise BadRow(f"{name}.tool_calls is {kind_of(calls)}, expected a list.")
    calls = [_call(call, f"{name}.tool_calls[{n}]") for n, call in enumerate(calls)]
    if raw.get("function_call"):
        old = _call(parsed(raw["function_call"], f"{name}.function_call", "{"), f"{name}.function_call")
        if calls and [call["function"] for call in calls] != [old["function"]]:
            raise BadRow(f"{name} has tool_calls and another function_call. Keep one of them.")
        calls = calls or [old]
    ids = [call["id"] for call in calls if "id" in call]
    for own in ids:
        if ids.count(own) > 1:
            raise BadRow(f"{name}.tool_calls has the id {own!r} twice: which call a response answers would be unknown.")
    return calls


def _call(call: Any, name: str) -> dict[str, Any]:
    """A call as OpenAI writes it, {type, id, function: {name, arguments}}, or its function alone."""
    if not isinstance(call, dict):
        raise BadRow(f"{name} is {kind_of(call)}, expected an object with function.")
    if call.get("type", "function") != "function":
        raise BadRow(f"{name} is of type {call['type']!r}, expected function.")
    if "function" in call:
        _refuse_unknown(call, frozenset(("type", "id", "function")), name)
        function, name = call["function"], f"{name}.function"
    else:
        function = {key: value for key, value in call.items() if key not in ("type", "id")}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRow(f"{name} has no name: the function that is called was expected.")
    _refuse_unknown(function, frozenset(("name", "arguments")), name)
    arguments = parsed(function.get("arguments") or {}, f"{name}.arguments", "{")
    if not isinstance(arguments, dict):
        raise BadRow(f"{name}.arguments is {kind_of(arguments)}, expected an object or JSON text of one.")
    read: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if call.get("id") is not None:
        read["id"] = call["id"]
    check_text(read, name)
    return read


def _responses(raw: dict[str, Any], name: str) -> list[dict[str, Any]]:
    name = f"{name}.tool_responses"
    responses = parsed(raw.get("tool_responses"), name, "[") or []
    if not isinstance(responses, list):
        raise BadRow(f"{name} is {kind_of(responses)}, expected a list of {{name, response}}.")
    for n, response in enumerate(responses):
        if not isinstance(response, dict) or not isinstance(response.get("name"), str) or "response" not in response:
            raise BadRow(f"{name}[{n}] is no object with name and response.")
        _refuse_unknown(response, frozenset(("name", "response")), f"{name}[{n}]")
    check_text(responses, name)
    return responses


def weight_of(keys: dict[str, Any], name: str) -> float | None:
    """Take out the weights that a row or a message has, and return what they say; they may not contradict."""
    said = {key: value for key in WEIGHTS if (value := keys.pop(key, None)) not in (None, "")}
    if not said:
        return None
    for key, value in said.items():
        said[key] = value = _number(value)
        if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
            raise BadRow(
                f"{name} has {key} {value!r}, expected true, false or a number from 0 to 1: how much an answer counts. "
                "If it means something else, name it in data.ignore."
            )
    numbers = {float(value) for value in said.values() if value is not True} or {1.0}
    if len(numbers) > 1 or (numbers == {0.0} and any(value is True for value in said.values())):
        told = " and ".join(f"{key} {json.dumps(value)}" for key, value in said.items())
        raise BadRow(f"{name} has {told}, which contradict each other. Keep one of them.")
    return numbers.pop()


def _number(value: Any) -> Any:
    """A weight of a CSV file is text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value.lower())
    except ValueError:
        return value


def check_order(roles: list[str]) -> None:
    """Refuse messages of which no answer can be learned."""
    if "assistant" not in roles:
        raise BadRow("no assistant turn: nothing to learn.")
    if roles[-1] != "assistant":
        raise BadRow(f"the last message is from {roles[-1]}: nothing to learn after it. End with the assistant.")
    if "user" not in roles[: roles.index("assistant")]:
        raise BadRow("the assistant's turn has no user turn before it.")


def link_answers(messages: list[Message]) -> None:
    """Give each tool message the call that it answers: by its id, else by its name, else in their order.

    Templates look the function's name up by the call's id. Where several calls have none, all would seem to be the
    last one's: they get ids here.
    """
    caller, open_calls = None, []
    for n, message in enumerate(messages):
        if message["role"] != "tool":
            caller, open_calls = message, list(message.get("tool_calls", ()))
            continue
        if caller is None or not caller.get("tool_calls"):
            raise BadRow(f"messages[{n}] is from tool, but no message with tool_calls stands before it.")
        if "tool_responses" in caller:
            raise BadRow(f"messages[{n}] is from tool, though the call before it has tool_responses. Keep one of them.")
        call = _answered(message, open_calls, caller["tool_calls"], f"messages[{n}]")
        open_calls = [other for other in open_calls if other is not call]


def _answered(message: Message, open_calls: list[Any], calls: list[Any], name: str) -> dict[str, Any]:
    own, called = message.get("tool_call_id"), message.get("name")
    nameless = [call for call in open_calls if call.get("id") is None]
    if own is not None and any(call.get("id") == own for call in calls):
        call = next(call for call in calls if call.get("id") == own)
    elif own is not None and not nameless:
        raise BadRow(f"{name}.tool_call_id {own!r} is of no call before it.")
    else:
        waiting = nameless if own is not None else open_calls
        same = [call for call in waiting if call["function"]["name"] == called]
        if not waiting or (called and not same):
            raise BadRow(f"{name} is from tool, but answers no call before it: there is none left{_of(called)}.")
        call = (same or waiting)[0]
        if own is None:
            message["name"] = call["function"]["name"]
        if own is not None or len(calls) > 1:
            call["id"] = message["tool_call_id"] = own or call.get("id") or f"call_{calls.index(call)}"
    if called and called != call["function"]["name"]:
        raise BadRow(f"{name} has name {called!r}, but the call it answers is of {call['function']['name']!r}.")
    return call


def _of(called: str | None) -> str:
    return f" of {called!r}" if called else ""


def parsed(value: Any, name: str, begins: str) -> Any:
    """Parse JSON text that begins with one of `begins`; anything else is returned as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(tuple(begins)):
        return value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        read: dict[str, Any] = {}
        for key, item in pairs:
            if read.setdefault(key, item) != item:
                raise BadRow(f"{name} has the key {key!r} twice with different values. Keep one of them.")
        return read

    try:
        return json.loads(value, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{name} is a string that is no JSON: {error}.") from error


def check_text(value: Any, name: str) -> None:
    """Refuse half surrogate pairs, in a text or anywhere in an object."""
    words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    try:
        words.encode()
    except UnicodeEncodeError as error:
        place = f" at character {error.start}" if isinstance(value, str) else ""
        raise BadRow(f"{name} holds half a surrogate pair{place}: not text.") from error


def kind_of(value: Any) -> str:
    """A value's JSON type, for a message."""
    kinds = {str: "a string", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    if isinstance(value, list) and any(isinstance(item, dict) and "role" in item for item in value):
        return "a list of messages"
    return kinds.get(type(value), "a list" if isinstance(value, list) else "an object")
