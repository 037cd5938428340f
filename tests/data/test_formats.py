"""What stands in a row is in its conversation, or the row is refused by the name of the key."""

import json
from pathlib import Path
from typing import Any

import pytest

from ds_dgemma.config.data import ColumnsSection
from ds_dgemma.data.formats import FORMATS, BadRow, Conversation, Layout, Text, read_row

EXAMPLES = Path(__file__).parents[2] / "ds_configs/examples"
Row = dict[str, Any]

TOOL = {"type": "function", "function": {"name": "get_tide", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "get_tide", "arguments": {"place": "Wick"}}}
USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def chat(*messages: Row, **keys: Any) -> Row:
    return {"messages": list(messages), **keys}


def read(row: Row, **layout: Any) -> Conversation | Text:
    return read_row(row, Layout(**layout))[0]


def answer(**keys: Any) -> Row:
    return ANSWER | keys


def call(name: str = "get_tide", **keys: Any) -> Row:
    return {"type": "function", "function": {"name": name, "arguments": {}}, **keys}


def test_openai_messages_with_all_they_may_have():
    row = chat(
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
        {"role": "user", "content": "q", "name": "Ada", "id": "m1", "timestamp": 3},
        {
            "role": "assistant",
            "content": None,
            "thinking": "Look it up.",
            "tool_calls": [{"id": "c1", "function": {"name": "get_tide", "arguments": '{"place": "Wick"}'}}],
            "refusal": None,
        },
        {"role": "tool", "tool_call_id": "c1", "content": "3 m"},
        {"role": "assistant", "content": "a", "weight": 0.5},
        tools='[{"name": "get_tide", "parameters": {"type": "object", "properties": {}}}]',
        chat_template_kwargs={"enable_thinking": True},
        source="log",
        id=7,
    )
    assert read_row(row, Layout()) == (
        Conversation(
            [
                {"role": "developer", "content": "Be kind."},
                {"role": "user", "content": "q", "name": "Ada"},
                {
                    "role": "assistant",
                    "content": "",
                    "reasoning_content": "Look it up.",
                    "tool_calls": [CALL | {"id": "c1"}],
                },
                {"role": "tool", "content": "3 m", "tool_call_id": "c1"},
                {"role": "assistant", "content": "a"},
            ],
            [None, None, None, None, 0.5],
            [TOOL],
            {"enable_thinking": True},
        ),
        ["source", "timestamp of messages"],
    )


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"system": "s", **chat(USER, ANSWER)}, [{"role": "system", "content": "s"}, USER, ANSWER]),
        (
            {"system": " s", **chat({"role": "developer", "content": "s"}, USER, ANSWER)},
            [{"role": "developer", "content": "s"}, USER, ANSWER],
        ),
        (chat(USER, answer(reasoning="t")), [USER, answer(reasoning_content="t")]),
        (chat(USER, answer(reasoning="t", thinking="t", tool_calls=[])), [USER, answer(reasoning_content="t")]),
        (
            chat(USER, answer(tool_responses=[{"name": "get_tide", "response": {"m": 3}}])),
            [USER, answer(tool_responses=[{"name": "get_tide", "response": {"m": 3}}])],
        ),
        (
            chat(USER, answer(function_call={"name": "get_tide", "arguments": '{"place": "Wick"}'})),
            [USER, answer(tool_calls=[CALL])],
        ),
        (
            chat(
                USER,
                {"role": "assistant", "function_call": {"name": "get_tide", "arguments": ""}},
                {"role": "function", "name": "get_tide", "content": "3"},
                ANSWER,
            ),
            [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [call()]},
                {"role": "tool", "content": "3", "name": "get_tide"},
                ANSWER,
            ],
        ),
        (
            chat(  # two calls without ids: templates would take both answers for the last call's
                USER,
                {"role": "assistant", "tool_calls": [call("f"), call("g")]},
                {"role": "tool", "name": "g", "content": "2"},
                {"role": "tool", "content": "1"},
                ANSWER,
            ),
            [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [call("f", id="call_0"), call("g", id="call_1")]},
                {"role": "tool", "content": "2", "name": "g", "tool_call_id": "call_1"},
                {"role": "tool", "content": "1", "name": "f", "tool_call_id": "call_0"},
                ANSWER,
            ],
        ),
        (
            {
                "system": "s",
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": '{"name": "get_tide", "arguments": {"place": "Wick"}}'},
                    {"from": "observation", "value": "3"},
                    {"from": "gpt", "value": "a"},
                ],
            },
            [
                {"role": "system", "content": "s"},
                USER,
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "3", "name": "get_tide"},
                ANSWER,
            ],
        ),
        ({"conversations": [USER, ANSWER]}, [USER, ANSWER]),
        (
            {"instruction": "Say it in capitals.", "input": "tide", "output": "TIDE"},
            [
                {"role": "user", "content": "Say it in capitals.\ntide"},
                {"role": "assistant", "content": "TIDE"},
            ],
        ),
        (
            {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["q0", "a0"]]},
            [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "q0"},
                {"role": "assistant", "content": "a0"},
                USER,
                ANSWER,
            ],
        ),
        ({"prompt": "q", "completion": "a"}, [USER, ANSWER]),
        ({"prompt": "q", "response": "a", "completion": None}, [USER, ANSWER]),
        ({"prompt": [USER], "completion": [answer(reasoning="t")]}, [USER, answer(reasoning_content="t")]),
    ],
)
def test_every_format_becomes_messages(row, messages):
    conversation = read(row)
    assert isinstance(conversation, Conversation)
    assert conversation.messages == messages


def test_running_text_is_kept_as_it_is():
    assert read_row({"text": " A tide.\n", "source": "book"}, Layout()) == (Text(" A tide.\n"), ["source"])


@pytest.mark.parametrize(
    ("row", "weights"),
    [
        (chat(USER, answer(weight=0), USER, answer(weight=1)), [None, 0.0, None, 1.0]),
        (chat(USER, answer(train=False), USER, ANSWER), [None, 0.0, None, None]),
        (chat(USER, answer(loss=False), USER, answer(loss=True)), [None, 0.0, None, 1.0]),
        (chat(USER, answer(loss_mask=0), USER, answer(trainable=False)), [None, 0.0, None, 0.0]),
        (chat(USER | {"weight": 0}, answer(train=True, weight=0.25)), [None, 0.25]),
        (chat(USER, answer(weight=0), USER, ANSWER, weight=0.5), [None, 0.0, None, 0.5]),
        ({"prompt": "q", "completion": "a", "weight": "0.5"}, [None, 0.5]),  # a CSV file's cell
        ({"prompt": [USER, ANSWER, USER], "completion": "a"}, [None, 0.0, None, None]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "loss": 0}]}, [None, 0.0]),
    ],
)
def test_a_row_says_what_its_answers_count_for(row, weights):
    conversation = read(row)
    assert isinstance(conversation, Conversation)
    assert conversation.weights == weights


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"mesages": []}, "the columns are: mesages. Other columns are mapped with data.columns.prompt"),
        ({"messages": [], "text": "t"}, "may be read as messages or as text"),
        ({"messages": {}}, "messages is an object, expected a list"),
        ({"messages": []}, "messages is empty"),
        (chat("hello"), "messages[0] is a string, expected an object"),  # type: ignore[arg-type]
        (chat({"role": "user"}, ANSWER), "messages[0] has no content"),
        (chat({"content": "q"}, ANSWER), "messages[0] has no role"),
        (chat(USER, {"role": "model", "content": "a"}), "role 'model', expected one of system, developer, user, assi"),
        (chat(USER, {"role": "model", "content": "a"}), "Use assistant"),
        (chat({"role": "user", "content": None}, ANSWER), "messages[0].content is null, expected a string"),
        (chat(USER, answer(content=3)), "messages[1].content is a number"),
        (chat(USER, answer(content=" ")), "messages[1].content is empty"),
        (chat(USER, answer(content=None, reasoning="t")), "messages[1] is an answer that is a thought only"),
        (chat(USER, answer(content="\ud800")), "messages[1].content holds half a surrogate pair at character 0"),
        (chat({"role": "user", "content": [{"type": "tool"}]}, ANSWER), "a part of type tool, only text and image"),
        (chat({"role": "user", "content": [{"type": "video"}]}, ANSWER), "a part of type video. Video and audio"),
        (
            chat({"role": "user", "content": [{"type": "text", "text": "q", "weight": 0}]}, ANSWER),
            "a part of messages[0].content has weight, which may say",
        ),
        (chat(USER, ANSWER, image_url="a.png"), "has image_url. An image is a part of a message's content"),
        (chat(USER | {"images": ["a.png"]}, ANSWER), "messages[0] has images. An image is a part"),
        (chat(USER), "no assistant turn"),
        (chat(USER, ANSWER, USER), "the last message is from user"),
        (chat({"role": "system", "content": "s"}, ANSWER), "no user turn before it"),
        (chat(USER, answer(refusal="No.")), "messages[1] has refusal, which is not read"),
        (chat(USER, answer(reasoning_details=[{"text": "t"}])), "messages[1] has reasoning_details, which is not read"),
        (chat(USER, answer(mask=True)), "messages[1] has mask, which may say"),
        (
            chat(USER, answer(reasoning="t", thinking="u")),
            "messages[1] has reasoning and thinking with different words",
        ),
        (chat(USER | {"thinking": "t"}, ANSWER), "messages[0] has thinking, though it is from user"),
        (chat(USER | {"tool_calls": [CALL]}, ANSWER), "messages[0] has tool_calls, though it is from user"),
        (chat(USER, answer(weight=2)), "messages[1] has weight 2, expected true, false or a number from 0 to 1"),
        (chat(USER, answer(weight=float("nan"))), "messages[1] has weight nan, expected"),
        (chat(USER, answer(weight=1, train=False)), "has weight 1 and train false, which contradict each other"),
        (chat(USER | {"train": True}, ANSWER), "messages[0] is from user and has a weight of 1: only answers are"),
        (chat(USER, ANSWER, loss_weights=[0, 1]), "has loss_weights, which may say what is learned"),
        (chat(USER, ANSWER, loss=[0, 1]), "the row has loss [0, 1], expected true, false or a number"),
        (chat(USER, answer(tool_calls=["f"])), "messages[1].tool_calls[0] is a string"),
        (chat(USER, answer(tool_calls=[{"function": {}}])), "messages[1].tool_calls[0].function has no name"),
        (chat(USER, answer(tool_calls=[call(type="custom")])), "tool_calls[0] is of type 'custom', expected function"),
        (
            chat(USER, answer(tool_calls=[{"name": "f", "arguments": "{"}])),
            "messages[1].tool_calls[0].arguments is a string that is no JSON",
        ),
        (
            chat(USER, answer(tool_calls=[{"name": "f", "arguments": [1]}])),
            "messages[1].tool_calls[0].arguments is a list, expected an object",
        ),
        (chat(USER, answer(tool_calls=[CALL], function_call={"name": "g"})), "tool_calls and another function_call"),
        (chat(USER, answer(tool_responses=["r"])), "messages[1].tool_responses[0] is no object with name and response"),
        (chat(USER, ANSWER, {"role": "tool", "content": "3"}, ANSWER), "messages[2] is from tool, but no message with"),
        (
            chat(USER, answer(tool_calls=[call(id="x")]), {"role": "tool", "tool_call_id": "y", "content": ""}, ANSWER),
            "messages[2].tool_call_id 'y' is of no call before it",
        ),
        (
            chat(USER, answer(tool_calls=[CALL]), {"role": "tool", "name": "f", "content": "3"}, ANSWER),
            "messages[2] is from tool, but answers no call before it: there is none left of 'f'",
        ),
        (
            chat(
                USER,
                answer(tool_calls=[CALL], tool_responses=[{"name": "f", "response": 3}]),
                {"role": "tool", "content": "3"},
                ANSWER,
            ),
            "messages[2] is from tool, though the call before it has tool_responses",
        ),
        (chat({"role": "system", "content": "t"}, USER, ANSWER, system="s"), "system text is another than that of its"),
        (chat(USER, ANSWER, system=["s"]), "system is a list, expected a string"),
        (chat(USER, ANSWER, tools="get_tide"), "tools is a string, expected a list"),
        (chat(USER, ANSWER, tools=[{"type": "web_search"}]), "tools[0] has no function"),
        (chat(USER, ANSWER, tools=[{"name": "f", "input_schema": {"a": 1}}]), "tools[0].function has input_schema"),
        (chat(USER, ANSWER, tools=[TOOL], functions=[{"name": "f"}]), "tools and functions declare different things"),
        (chat(USER, ANSWER, chat_template_kwargs="x"), "chat_template_kwargs is a string, expected an object"),
        (chat(USER, ANSWER, chat_template_kwargs={"tools": []}), "chat_template_kwargs has tools"),
        (
            chat(USER, ANSWER, enable_thinking=True),
            "has enable_thinking, which messages does not read. Put it into chat",
        ),
        (chat(USER, ANSWER, history=[["q", "a"]]), "has history, which messages does not read"),
        (chat(USER, ANSWER, tool_choice="auto"), "has tool_choice, which messages does not read"),
        (chat(USER, ANSWER, rejected="b"), "has rejected, which messages does not read. Preferences are not learned"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "bot", "value": "a"}]},
            "is from 'bot', expected",
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": ""}]},
            "conversations[1].value is empty",
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f()"}]},
            "conversations[1].value is a string, expected JSON of {name, arguments}",
        ),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, "history[0] is a list, expected a pair"),
        ({"instruction": "q", "output": "a", "context": "c"}, "has context, which alpaca does not read"),
        ({"instruction": "q", "output": ["a", "b"]}, "output has a part that is a string"),
        ({"prompt": "q", "completion": "a", "label": False}, "label is false"),
        ({"prompt": "q", "completion": None}, "no column messages"),
        (chat(USER, answer(skip=True)), "messages[1] has skip, which may say what is learned"),
        (chat(USER, answer(score=0)), "messages[1] has score, which may say what is learned"),
        (
            {"conversations": [{"from": "human", "value": "q", "content": "other"}, {"from": "gpt", "value": "a"}]},
            "conversations[0] has value and another content",
        ),
        (
            {"conversations": [{"from": "human", "role": "system", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "conversations[0] has from and another role",
        ),
        (
            chat(USER, answer(tool_calls=[call(id="c"), call("other", id="c")])),
            "messages[1].tool_calls has the id 'c' twice",
        ),
        (
            chat(USER, answer(function_call={"name": "f", "arguments": '{"a": 1, "a": 2}'})),
            "messages[1].function_call.arguments has the key 'a' twice with different values",
        ),
        ({"text": None, "source": None}, "all its columns are null: text, source"),
        ({"text": " "}, "text is empty"),
        ({"text": ["t"]}, "text is a list, expected a string"),
        ({"text": "t", "system": "s"}, "has system, which text does not read"),
        ({"text": "t", "weight": 0.5}, "has a weight other than 1, but running text counts whole"),
    ],
)
def test_what_is_not_obeyed_is_refused_by_name(row, found):
    with pytest.raises(BadRow) as problem:
        read(row)
    assert found in str(problem.value)


@pytest.mark.parametrize(
    ("columns", "row", "found"),
    [
        (
            {},
            {"p": "q", "r": "a", "system": "s"},
            "has system, which data.columns does not read. Map it with data.columns.",
        ),
        (
            {},
            {"p": "q", "r": "a", "history": [["q", "a"]]},
            "has history, which data.columns does not read. Map it with",
        ),
        ({}, {"p": "q", "r": "a", "input": "i"}, "template in data.columns, such as prompt: '{question} {input}'"),
        ({}, {"p": "q", "r": "a", "messages": [USER, ANSWER]}, "has messages, which data.columns does not read"),
        ({}, {"p": "q", "answer": "a"}, "no column r; the columns are: p, answer."),
        (
            {"response": "anser"},
            {"p": "q", "answer": "a"},
            "no column anser; the columns are: p, answer. Did you mean answ",
        ),
        ({}, {"p": "q", "r": None}, "column r is null, expected a string"),
        ({}, {"p": "q", "r": 3}, "column r is a number, expected a string"),
        ({"prompt": "{p} {c}"}, {"p": "q", "c": [USER], "r": "a"}, "column c is a list of messages, expected a string"),
        ({"prompt": "{p"}, {"p": "q", "r": "a"}, "'{p' is no template"),
        ({"prompt": "{p!r}"}, {"p": "q", "r": "a"}, "'{p!r}' is no template: columns' names alone"),
    ],
)
def test_words_beside_the_mapped_columns_are_refused(columns, row, found):
    with pytest.raises(BadRow) as problem:
        read(row, columns=ColumnsSection(**{"prompt": "p", "response": "r"} | columns))
    assert found in str(problem.value)


def test_ignored_keys_are_left_out_of_rows_and_messages_but_not_of_tools():
    row = chat(USER, answer(annotations=["x"]), history=[["q", "a"]], tools=[TOOL], note="n")
    assert read_row(row, Layout(ignore=frozenset({"history", "annotations", "note", "type"}))) == (
        Conversation([USER, ANSWER], [None, None], [TOOL]),
        [],
    )


def test_words_that_stand_in_a_message_already_are_not_lost():
    assert read_row(chat(USER, ANSWER, prompt="q", source=""), Layout()) == (
        Conversation([USER, ANSWER], [None, None]),
        ["prompt"],
    )


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_an_example_that_is_told_by_its_keys(name):
    rows = [json.loads(line) for line in (EXAMPLES / f"{name}.jsonl").open()]
    assert [read(row) for row in rows] == [read(row, format=name) for row in rows]
    assert len(rows) > 1


def test_the_examples_of_tools_and_thoughts_show_them_in_twenty_rows_each():
    tools, thoughts = (
        [read(json.loads(line)) for line in (EXAMPLES / f"{name}.jsonl").open()]
        for name in ("tool_calling", "thinking")
    )
    assert [len(tools), len(thoughts)] == [20, 20]
    assert all(row.tools for row in tools)
    assert sum(any("tool_calls" in message for message in row.messages) for row in tools) == 18
    assert all(row.template_kwargs == {"enable_thinking": True} for row in thoughts)
    assert all(any("reasoning_content" in message for message in row.messages) for row in thoughts)
