"""Our learned spans against the assistant mask of the released template's training twin, as TRL keeps both.

The released template writes; the twin writes the same with generation tags, of which transformers makes a mask. Where
we differ on purpose, a test says so.
"""

import importlib.util
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from ds_dgemma.data.chat import Document, tokenize_rows
from ds_dgemma.data.drafter import Drafter
from ds_dgemma.data.formats import BadRow, Conversation

spec = importlib.util.find_spec("trl")
if spec is None or spec.origin is None:
    pytest.skip("needs trl, whose wheel has the released chat template", allow_module_level=True)
TEMPLATES = Path(spec.origin).parent / "chat_templates"
RELEASED = (TEMPLATES / "diffusion_gemma.jinja").read_text()
TRAINING = (TEMPLATES / "diffusion_gemma_training.jinja").read_text()

TIDE = {
    "type": "function",
    "function": {
        "name": "get_tide",
        "description": "Tide at a harbour",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time", "parameters": {}}}


def system(text, role="system"):
    return {"role": role, "content": text}


def user(text):
    return {"role": "user", "content": text}


def model(text="", thought=None, calls=None, **more):
    message = {"role": "assistant", "content": text, **more}
    if thought is not None:
        message["reasoning_content"] = thought
    if calls is not None:
        message["tool_calls"] = [
            {"type": "function", "id": f"call_{number}", "function": {"name": name, "arguments": arguments}}
            for number, (name, arguments) in enumerate(calls)
        ]
    return message


def tool(text, number=0):
    return {"role": "tool", "tool_call_id": f"call_{number}", "content": text}


PIER = ("get_tide", {"place": "pier"})
SAME = {  # the mask, without the white space behind an end of turn
    "one turn": [user("Hi"), model("Hello.")],
    "two turns": [user("Hi"), model("Hello."), user("And?"), model("Nothing.")],
    "five turns": [each for n in range(5) for each in (user(f"Say {n}"), model(f"It is {n}."))],
    "system": [system("Be brief."), user("Hi"), model("Hello.")],
    "developer": [system("Be brief.", "developer"), user("Hi"), model("Hello."), user("And?"), model("No.")],
    "empty system": [system(""), user("Hi"), model("Hello.")],
    "thought": [user("2+2?"), model("4", thought="Two and two.")],
    "thought with lines": [user("2+2?"), model("4", thought="Two and two.\n\nThat is four.")],
    "thought only": [user("2+2?"), model(thought="Two and two.")],
    "trailing spaces": [user("Hi  \n"), model("  Hello.  \n\n"), user(" And? "), model("No. ")],
    "line breaks": [user("a\n\nb"), model("c\n\nd\n- e\n- f"), user("g"), model("```\nh\n```")],
    "Unicode": [user("Größe? 你好"), model("Größer. 👩‍👩‍👧 e\u0301 \u2028 ぎ"), user("さようなら"), model("再见")],
    "empty user": [user(""), model("Hello.")],
    "user of spaces": [user("  "), model("Hello."), user(""), model("Still here.")],
    "two users": [user("Hi"), user("there"), model("Hello.")],
    "late system": [user("Hi"), model("Hello."), system("Be brief."), user("And?"), model("No.")],
    "consecutive assistants": [user("Hi"), model("Hello."), model("How are you?")],
    "three assistants": [user("Hi"), model("One."), model("Two."), model("Three."), user("And?"), model("Four.")],
    "assistant first": [model("Welcome."), user("Hi"), model("Hello.")],
    "ends with a user": [user("Hi"), model("Hello."), user("Bye")],
    "quotes": [user('Say "it\'s"'), model('"It\'s" & <b>it</b>')],
}
CALLS = {  # besides, the <|tool_response> that ends a call is learned
    "a call": ([user("Tide?"), model(calls=[PIER])], [TIDE]),
    "two calls": ([user("Tide?"), model(calls=[PIER, ("clock", {})])], [TIDE, CLOCK]),
    "no tools declared": ([user("Tide?"), model(calls=[PIER])], None),
    "thought and call": ([user("Tide?"), model(thought="I must look.", calls=[PIER])], [TIDE]),
    "arguments": ([user("Tide?"), model(calls=[("f", {"a": 1, "b": [True, None], "c": {"d": "ü"}})])], [TIDE]),
    "call after a chat": ([user("Hi"), model("Hello."), user("Tide?"), model(calls=[PIER])], [TIDE]),
    "own response": (
        [user("Tide?"), model("At 3.", calls=[PIER], tool_responses=[{"name": "get_tide", "response": {"t": 3}}])],
        [TIDE],
    ),
    "system and call": ([system("Be brief."), user("Tide?"), model(calls=[PIER])], [TIDE]),
}
RESPONSES = {  # besides, the opener of the turn behind a tool's response is not
    "answer after a response": [user("Tide?"), model(calls=[PIER]), tool("3"), model("At 3.")],
    "two responses": [user("Tide?"), model(calls=[PIER, ("clock", {})]), tool("3"), tool("12", 1), model("At 3.")],
    "JSON response": [user("Tide?"), model(calls=[PIER]), tool('{"t": 3, "at": ["a", "b"]}'), model("At 3.")],
    "call after a response": [
        user("Tide?"),
        model(calls=[("clock", {})]),
        tool("12"),
        model(calls=[PIER]),
        tool("3"),
        model("At 3."),
    ],
    "turn after a response": [user("Tide?"), model(calls=[PIER]), tool("3"), model("At 3."), user("Ta"), model("Bye.")],
    "thought after a response": [
        user("Tide?"),
        model(calls=[PIER]),
        tool("3"),
        model("At 3.", thought="It says 3."),
    ],
}


@pytest.fixture(scope="module")
def gemma(gemma_tokenizer) -> PreTrainedTokenizerFast:
    gemma_tokenizer.chat_template = RELEASED
    return gemma_tokenizer


def mask(tokenizer, messages, tools=None, **variables) -> list[str]:
    """The runs of masked tokens of the twin as text."""
    written = tokenizer.apply_chat_template(
        messages,
        tools=tools,
        chat_template=TRAINING,
        return_assistant_tokens_mask=True,
        return_dict=True,
        **variables,
    )
    runs, behind = [], None
    for place, (token, learned) in enumerate(zip(written["input_ids"], written["assistant_masks"], strict=True)):
        if learned:
            runs = runs if behind == place - 1 and runs else [*runs, []]
            runs[-1].append(token)
            behind = place
    return [tokenizer.decode(run) for run in runs]


def learned(tokenizer, messages, tools=None, **variables) -> list[tuple[str, str]]:
    """Each learned text, in order, with the 30 characters before it."""
    rows = [(0, Conversation(messages, [None] * len(messages), tools))]
    documents = tokenize_rows(rows, Drafter(tokenizer, "all", "error", variables))
    for document in documents:
        assert isinstance(document, Document), document
    spans = [(span, document.ids) for document in documents for span in document.spans]
    assert sorted(span.number for span, _ in spans) == list(range(len(spans)))
    return [
        (tokenizer.decode(ids[: span.start])[-30:], tokenizer.decode(ids[span.start : span.end]))
        for span, ids in sorted(spans, key=lambda each: each[0].number)
    ]


def texts(tokenizer, messages, tools=None, **variables) -> list[str]:
    return [text for _, text in learned(tokenizer, messages, tools, **variables)]


@pytest.mark.parametrize("messages", SAME.values(), ids=SAME)
def test_learned_is_what_the_training_twin_marks_without_white_space_behind_a_turn(gemma, messages):
    assert texts(gemma, messages) == [run.removesuffix("\n") for run in mask(gemma, messages)]


@pytest.mark.parametrize(("messages", "tools"), CALLS.values(), ids=CALLS)
def test_the_token_that_ends_a_call_is_learned_for_it_stops_generation(gemma, messages, tools):
    marked = [run.removesuffix("\n") for run in mask(gemma, messages, tools)]
    ours = texts(gemma, messages, tools)
    assert ours == [run + "<|tool_response>" if run.endswith("<tool_call|>") else run for run in marked]
    assert any(run.endswith("<|tool_response>") for run in ours)


@pytest.mark.parametrize("messages", RESPONSES.values(), ids=RESPONSES)
def test_an_opener_behind_a_tools_response_is_neither_learned_nor_put_before_the_model(gemma, messages):
    marked = [run.removesuffix("\n") for run in mask(gemma, messages, [TIDE, CLOCK])]
    ours = learned(gemma, messages, [TIDE, CLOCK])
    assert [text.removesuffix("<|tool_response>") for _, text in ours] == marked
    after = [before for before, _ in ours if before.endswith("<tool_response|>")]
    assert len(after) == sum(
        message["role"] != "tool" and last["role"] == "tool" for last, message in pairwise(messages)
    )


def test_thoughts_of_earlier_turns_are_learned_in_a_document_of_their_own(gemma):
    messages = [user("2+2?"), model("4", thought="Two and two."), user("3+3?"), model("6", thought="Three.")]
    assert mask(gemma, messages) == ["4<turn|>\n", "<|channel>thought\nThree.\n<channel|>6<turn|>\n"]
    assert learned(gemma, messages) == [
        ("user\n2+2?<turn|>\n<|turn>model\n", "<|channel>thought\nTwo and two.\n<channel|>4<turn|>"),
        ("user\n3+3?<turn|>\n<|turn>model\n", "<|channel>thought\nThree.\n<channel|>6<turn|>"),
    ]


def test_with_enable_thinking_an_answer_behind_a_response_goes_on_with_the_thought_that_the_prompt_begins(gemma):
    messages = RESPONSES["thought after a response"]
    assert learned(gemma, messages, [TIDE], enable_thinking=True)[1] == (
        "l_response|><|channel>thought\n",
        "It says 3.\n<channel|>At 3.<turn|>",
    )
    row = Conversation(RESPONSES["answer after a response"], [None] * 4, [TIDE])
    ((_, problem),) = tokenize_rows([(0, row)], Drafter(gemma, "all", "error", {"enable_thinking": True}))
    assert isinstance(problem, BadRow)
    assert "begins this answer with '<|channel>thought\\n'" in str(problem)
