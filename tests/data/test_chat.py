"""Where answers start and end, what is learned of them and which rows are refused, by templates of several manners."""

import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ds_dgemma.data.chat import Document, prompt_text, tokenize_rows
from ds_dgemma.data.drafter import Drafter
from ds_dgemma.data.formats import BadRow, Conversation, Text
from ds_dgemma.data.image_files import ImageFiles
from ds_dgemma.errors import UserError
from tests.data.conftest import GEMMA

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": " first "},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "second"},
]
HEAD = "<bos><|turn>system\nbe brief<turn|>\n<|turn>user\none<turn|>\n<|turn>model\n"
SECOND = HEAD + "first<turn|>\n<|turn>user\ntwo<turn|>\n<|turn>model\n"

EMPTY_THOUGHT = GEMMA.replace("'<|turn>model\\n' }}{% endif", "'<|turn>model\\n<|channel>T\\n<channel|>' }}{% endif")
PLAIN = (
    "{% for message in messages %}{{ message.role + ':' + message.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
THOUGHT_IN_TURN = GEMMA.replace(
    "message.content | trim", "('<channel|>' if message.role == 'assistant' else '') + message.content | trim"
)
REWRITES = "{{ messages | length }}" + GEMMA
# as the released template: thoughts of the last turn only, neighbours joined, a turn opened again behind a tool
TOOLS = (
    "{{ bos_token }}{% if tools %}{{ '<|turn>system\\n' + tools[0].function.name + '<turn|>\\n' }}{% endif %}"
    "{% set ns = namespace(user=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set joined = loop.nextitem and m.role == loop.nextitem.role == 'assistant' %}"
    "{% set joins = not loop.first and m.role == loop.previtem.role == 'assistant' %}"
    "{% if m.role == 'tool' %}{{ '<tool>' + m.content + '</tool>' }}{% else %}"
    "{% if not joins %}{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}{% endif %}"
    "{% if m.reasoning_content and loop.index0 > ns.user %}"
    "{{ '<|channel>' + m.reasoning_content + '<channel|>' }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + (c.function.arguments | tojson) }}{% endfor %}"
    "{% for r in m.tool_responses or [] %}{{ '<tool>' + (r | tojson) + '</tool>' }}{% endfor %}"
    "{{ m.content | trim }}"
    "{% if not joined and (m.content or not (m.tool_calls or m.tool_responses)) %}{{ '<turn|>\\n' }}{% endif %}"
    "{% endif %}{% endfor %}"
    "{% set last = messages[-1] %}{% if add_generation_prompt and last.role != 'tool' and not last.tool_responses %}"
    "{{ '<|turn>model\\n' }}{% endif %}"
)
CALL = [{"type": "function", "function": {"name": "tide", "arguments": {"at": "pier"}}}]
TIDE = [{"type": "function", "function": {"name": "tide", "parameters": {}}}]


def user(text):
    return {"role": "user", "content": text}


def model(text="", **more):
    return {"role": "assistant", "content": text, **more}


def read(tokenizer, messages, template=GEMMA, weights=None, tools=None, kwargs=None, **settings):
    """The documents of one conversation, or what is wrong with it."""
    tokenizer.chat_template = template
    row = Conversation(messages, weights or [None] * len(messages), tools, kwargs or {})
    settings = {"learn": "all", "policy": "error", "variables": {}} | settings
    return tokenize_rows([(7, row)], Drafter(tokenizer, **settings))


def shown(tokenizer, documents):
    """Of each document: of each span the text before it, its own, its weight and number."""
    for document in documents:
        assert isinstance(document, Document), document
        assert document.row == 7
        assert document.spans[-1].end == len(document.ids)
    return [
        [
            (tokenizer.decode(each.ids[: span.start]), tokenizer.decode(each.ids[span.start : span.end]), *span[2:])
            for span in each.spans
        ]
        for each in documents
    ]


def refusal(tokenizer, messages, **settings) -> str:
    ((row, problem),) = read(tokenizer, messages, **settings)
    assert row == 7
    assert isinstance(problem, BadRow)
    return str(problem)


@pytest.mark.parametrize(
    ("template", "response"),
    [
        (GEMMA, "second<turn|>"),  # the newline that separates turns is not learned
        (EMPTY_THOUGHT, "second<turn|>"),  # the generation prompt says more than a rendered turn
        (THOUGHT_IN_TURN, "<channel|>second<turn|>"),  # a rendered turn says more than the prompt
        (PLAIN, "second\n"),  # no special token ends the turn: its text is kept
    ],
)
def test_the_prompt_is_what_generate_sees_and_the_response_the_rest_of_the_turn(tokenizer, template, response):
    (document,) = read(tokenizer, CHAT, template, learn="last")
    for_generate = tokenizer.apply_chat_template(CHAT[:-1], add_generation_prompt=True, return_dict=False)
    (span,) = document.spans
    assert document.ids[: span.start] == for_generate
    assert tokenizer.decode(document.ids[span.start :]) == response
    assert prompt_text(CHAT[:-1], tokenizer)[0] == tokenizer.decode(for_generate)


def test_all_answers_stand_in_one_document(tokenizer):
    (document,) = documents = read(tokenizer, CHAT)
    assert shown(tokenizer, documents) == [[(HEAD, "first<turn|>", 1.0, 0), (SECOND, "second<turn|>", 1.0, 1)]]
    assert (document.scored_from, document.starts_anywhere) == (1, False)


def test_an_answer_that_later_turns_rewrite_has_a_document_of_its_own_scored_where_they_part(tokenizer):
    messages = [user("a"), model("b"), user("c"), model("d", reasoning_content="T"), user("e"), model("f")]
    documents = read(tokenizer, messages, TOOLS)
    last = "<bos><|turn>user\na<turn|>\n<|turn>model\nb<turn|>\n<|turn>user\nc<turn|>\n<|turn>model\n"
    assert shown(tokenizer, documents) == [
        [
            ("<bos><|turn>user\na<turn|>\n<|turn>model\n", "b<turn|>", 1.0, 0),
            (last + "d<turn|>\n<|turn>user\ne<turn|>\n<|turn>model\n", "f<turn|>", 1.0, 2),
        ],
        [(last, "<|channel>T<channel|>d<turn|>", 1.0, 1)],
    ]
    assert [document.scored_from for document in documents] == [1, documents[1].spans[0].start]
    plain = read(tokenizer, CHAT, EMPTY_THOUGHT)  # they part in the prompt
    assert tokenizer.decode(plain[1].ids[: plain[1].scored_from]) == HEAD


@pytest.mark.parametrize(
    ("learn", "weights", "learned"),
    [
        ("last", [None, None], [("second<turn|>", 1.0, 0)]),
        ("last", [0.0, 0.5], [("first<turn|>", 0.0, 0), ("second<turn|>", 0.5, 0)]),
        ("last", [0.5, None], [("second<turn|>", 1.0, 0)]),
        ("all", [0.25, None], [("first<turn|>", 0.25, 0), ("second<turn|>", 1.0, 1)]),
        ("all", [None, 0.0], [("first<turn|>", 1.0, 0)]),
        ("weights", [0.0, 1.0], [("first<turn|>", 0.0, 0), ("second<turn|>", 1.0, 0)]),
        ("last", [1.0, 0.0], "its last answer has weight 0"),
        ("all", [0.0, 0.0], "nothing is learned of this row"),
        ("weights", [None, None], "no assistant message of this row says what it counts for"),
    ],
)
def test_a_rows_own_weights_are_obeyed(tokenizer, learn, weights, learned):
    settings = {"weights": [None, None, weights[0], None, weights[1]], "learn": learn}
    if isinstance(learned, str):
        assert learned in refusal(tokenizer, CHAT, **settings)
    else:
        ((*spans,),) = shown(tokenizer, read(tokenizer, CHAT, **settings))
        assert [span[1:] for span in spans] == learned


def test_an_answer_of_weight_0_is_found_where_the_template_writes_it_differently_later(tokenizer):
    messages = [user("a"), model("b", reasoning_content="T"), user("c"), model("d")]
    (spans,) = shown(tokenizer, read(tokenizer, messages, TOOLS, weights=[None, 0.0, None, None]))
    assert [span[1:] for span in spans] == [("b<turn|>", 0.0, 0), ("d<turn|>", 1.0, 0)]


def test_neighbouring_answers_that_the_template_joins_are_one(tokenizer):
    messages = [user("a"), model("b"), model("c"), user("d"), model("e")]
    (joined,) = shown(tokenizer, read(tokenizer, messages, TOOLS))
    assert [text for _, text, *_ in joined] == ["bc<turn|>", "e<turn|>"]
    for template in (GEMMA, PLAIN):
        (apart,) = shown(tokenizer, read(tokenizer, messages, template))
        assert [text.strip("\n").removesuffix("<turn|>") for _, text, *_ in apart] == ["b", "c", "e"]
    found = refusal(tokenizer, messages, template=TOOLS, weights=[None, 1.0, 0.5, None, None])
    assert "joins messages[1] and messages[2] into one turn, but their weights are 1 and 0.5" in found


def test_behind_a_tools_response_the_opener_is_neither_learned_nor_put_before_the_model(tokenizer):
    messages = [
        user("a"),
        model(tool_calls=CALL),
        {"role": "tool", "content": '{"h":  3}'},
        model("b"),
        user("c"),
        model("d"),
    ]
    call = "<bos><|turn>system\ntide<turn|>\n<|turn>user\na<turn|>\n<|turn>model\n"
    learned_call = '<call>tide{"at": "pier"}'
    response = call + learned_call + '<tool>{"h":  3}</tool>'
    assert shown(tokenizer, read(tokenizer, messages, TOOLS, tools=TIDE)) == [
        [
            (call, learned_call, 1.0, 0),
            (response + "<|turn>model\nb<turn|>\n<|turn>user\nc<turn|>\n<|turn>model\n", "d<turn|>", 1.0, 2),
        ],
        [(response, "b<turn|>", 1.0, 1)],
    ]


def test_responses_inside_a_message_are_context(tokenizer):
    own = model("b", tool_calls=CALL, tool_responses=[{"name": "tide", "response": {"h": "3 m"}}])
    call, learned_call = "<bos><|turn>user\na<turn|>\n<|turn>model\n", '<call>tide{"at": "pier"}'
    response = '<tool>{"name": "tide", "response": {"h": "3 m"}}</tool>'
    assert shown(tokenizer, read(tokenizer, [user("a"), own], TOOLS)) == [
        [(call, learned_call, 1.0, 0), (call + learned_call + response, "b<turn|>", 1.0, 1)]
    ]
    del own["tool_calls"]
    assert shown(tokenizer, read(tokenizer, [user("a"), own], TOOLS)) == [[(call + response, "b<turn|>", 1.0, 0)]]


def test_a_token_that_would_straddle_the_border_is_not_made(tokenizer):
    tokenizer.add_tokens([":x"])
    messages = [user("a"), model("xy"), user("b"), model("xz")]
    spans = [
        [tokenizer.convert_ids_to_tokens(each.ids[span.start - 1 : span.end]) for span in each.spans]
        for each in read(tokenizer, messages, PLAIN)
    ]
    assert spans == [[[":", "x", "z", "\n"]], [[":", "x", "y", "\n"]]]


def test_variables_of_the_template_come_from_the_config_and_the_row(tokenizer):
    template = GEMMA.replace("{{ bos_token }}", "{{ bos_token + style + mood }}")
    (((before, *_),),) = shown(
        tokenizer,
        read(tokenizer, CHAT[1:3], template, kwargs={"mood": "B"}, variables={"style": "s", "mood": "A"}),
    )
    assert before == "<bos>sB<|turn>user\none<turn|>\n<|turn>model\n"
    assert "chat_template_kwargs has messages" in refusal(tokenizer, CHAT, kwargs={"messages": []})


def test_control_tokens_are_refused_or_spelled_or_allowed(tokenizer):
    messages = [user("Say <|turn>."), model("With <eos>")]
    assert "messages[0].content holds <|turn>, a control token" in refusal(tokenizer, messages)
    assert "messages[1].content holds <unk>" in refusal(tokenizer, [user("a"), model("<unk>")])
    assert "tools[0].function.name holds <eos>" in refusal(
        tokenizer, CHAT, tools=[{"type": "function", "function": {"name": "<eos>"}}]
    )
    assert "reasoning_content" in refusal(tokenizer, [user("a"), model("<|channel>T<channel|>b")])
    learned = {}
    for policy in ("text", "allow"):
        (document,) = read(tokenizer, messages, policy=policy)
        learned[policy] = tokenizer.convert_ids_to_tokens(document.ids[document.spans[0].start :])
        assert document.ids.count(tokenizer.convert_tokens_to_ids("<|turn>")) == (2 if policy == "text" else 3)
    assert learned == {
        "text": [*"With ", "<", "e", "o", "s", ">", "<turn|>"],
        "allow": [*"With ", "<eos>", "<turn|>"],
    }


def test_as_text_no_template_can_cut_a_control_token(tokenizer):
    cuts = GEMMA.replace("message.content | trim", "message.content.split('<|channel>')[0] | trim")
    messages = [user("a"), model("b<|channel>c")]
    ((span,),) = shown(tokenizer, read(tokenizer, messages, cuts, policy="text"))
    assert span[1] == "b<|channel>c<turn|>"
    assert "leaves out a part of messages[1].content" in refusal(tokenizer, messages, template=cuts, policy="allow")


@pytest.mark.parametrize("policy", ["error", "text", "allow"])
def test_what_stands_for_an_image_is_always_refused(tokenizer, policy):
    found = refusal(tokenizer, [user("see <im>"), model("b")], policy=policy, images=ImageFiles(Path(), ("<im>",)))
    assert found.startswith("messages[0].content holds <im>, which stands for an image:")


@pytest.mark.parametrize(
    ("messages", "settings", "found"),
    [
        (CHAT, {"template": REWRITES}, "renders what stands before messages[4] differently"),
        (CHAT, {"template": "{{ raise_exception('roles must alternate') }}"}, "conversation: roles must alternate"),
        (CHAT, {"template": "{{ messages[0].content + 1 }}"}, "refuses this conversation"),
        (CHAT, {"template": "{{ messages[0].content }}"}, "writes nothing for the answer"),
        ([user("a"), model("  ")], {}, "messages[1] is the assistant's and says nothing"),
        ([user("a"), model("<eos>")], {"policy": "allow"}, "says nothing"),
        ([user("a"), model("b", reasoning_content="T")], {}, "leaves out a part of messages[1].reasoning_content: 'T'"),
        ([user("a"), model("b", tool_calls=CALL)], {}, "part of messages[1].tool_calls[0].function.name: 'tide'"),
        (
            [user("a"), model("<think>T</think>b")],
            {"template": GEMMA.replace("message.content |", "message.content.split('</think>')[-1] |")},
            "leaves out a part of messages[1].content: '<think>T</think>b'. A thought goes into",
        ),
        (
            CHAT,
            {"template": GEMMA.replace("in messages %}", "in messages if message.role != 'system' %}")},
            "part of messages[0].content: 'be brief'. It has no place for role system",
        ),
        (CHAT, {"tools": TIDE}, "leaves out a part of tools[0]: 'tide'"),
        (
            [user("a"), model("x", tool_calls=CALL), user("b"), model("c")],
            {"learn": "last"},
            "leaves out a part of messages[1].tool_calls[0].function.name",
        ),
        ([{**user("a"), "name": "Ada"}, model("b")], {}, "leaves out a part of messages[0].name: 'Ada'"),
        (CHAT, {"kwargs": {"loud": True}}, "chat_template_kwargs has loud, which the chat template does not read"),
        ([user("é"), model("b")], {}, "no token for a part of this row, which would become <unk>"),
        ([user("a")], {}, "no assistant turn"),
    ],
)
def test_what_carries_words_is_rendered_or_refused(tokenizer, messages, settings, found):
    assert found in refusal(tokenizer, messages, **settings)


def test_words_count_as_rendered_trimmed_or_escaped(tokenizer):
    escapes = GEMMA.replace("message.content | trim", "message.content | trim | tojson")
    ((span,),) = shown(tokenizer, read(tokenizer, [user(' say "a" '), model('"b"\n')], escapes))
    assert span[1] == json.dumps('"b"') + "<turn|>"


def test_running_text_begins_with_bos_and_needs_no_template(tokenizer):
    tokenizer.chat_template = None
    rows = [(0, Text("ab")), (1, Text(" ")), (2, Text("a<eos>"))]
    document, empty, control = tokenize_rows(rows, Drafter(tokenizer, "last", "error", {}))
    assert (tokenizer.decode(document.ids), document.spans, document.starts_anywhere) == (
        "<bos>ab",
        ((1, 3, 1.0, 0),),
        True,
    )
    assert (empty[0], str(empty[1])) == (1, "text is empty: nothing to learn.")
    assert (control[0], "text holds <eos>" in str(control[1])) == (2, True)
    with pytest.raises(UserError, match="no chat template"):
        tokenize_rows([(0, Conversation(CHAT, [None] * 5))], Drafter(tokenizer, "last", "error", {}))


def test_rows_come_back_in_order_whatever_their_fate(tokenizer):
    rows = [(9, Text("a")), (4, Conversation([user("a")], [None])), (5, Conversation(CHAT, [None] * 5)), (3, Text("b"))]
    told = tokenize_rows(rows, Drafter(tokenizer, "all", "error", {}))
    assert [each.row if isinstance(each, Document) else each[0] for each in told] == [9, 4, 5, 3]


def test_a_prompt_has_the_tokens_that_it_has_alone_where_the_tokenizer_looks_ahead():
    spaces = Tokenizer(models.WordLevel({"a": 0, ":": 1, " ": 2, "  ": 3, "\n": 4, "<unk>": 5}, unk_token="<unk>"))
    spaces.pre_tokenizer = pre_tokenizers.Split(
        Regex(r" +(?! |a)|[\s\S]"), "isolated"
    )  # spaces join unless text follows
    spaces.decoder = decoders.Fuse()
    looks_ahead = PreTrainedTokenizerFast(tokenizer_object=spaces)
    template = (
        "{% for m in messages %}{{ ':  ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}:  {% endif %}"
    )
    messages = [user("a"), model("a"), user("a"), model("a")]
    first, second = (document.ids for document in reversed(read(looks_ahead, messages, template)))
    assert first == [1, 2, 2, 0, 4, 1, 3, 0, 4]
    assert second == [1, 2, 2, 0, 4, 1, 2, 2, 0, 4, 1, 2, 2, 0, 4, 1, 3, 0, 4]


SOME_OF_A_TOOL = (
    "{{ bos_token }}{% for tool in tools %}{{ tool.function.name + ':' + tool.function.description }}"
    "{% for name, value in tool.function.parameters.properties.items() %}"
    "{{ name + ' ' + value.type + ' ' + (value.description or '') + (value.enum | tojson if value.enum else '') }}"
    "{% endfor %}{% endfor %}{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def declared(parameter, **function):
    properties = {"place": {"type": "string", **parameter}}
    function = {"name": "tide", "description": "height", "parameters": {"properties": properties}, **function}
    return [{"type": "function", "function": function}]


@pytest.mark.parametrize(
    ("tools", "unseen"),
    [
        (declared({}), None),
        (declared({"description": "a pier", "enum": ["a", 2]}, strict=True), None),
        (declared({"default": True}), "function.parameters.properties.place.default of tide"),
        (declared({"minimum": 3}), "function.parameters.properties.place.minimum"),
        (declared({}, returns={"description": "metres"}), "function.returns of tide"),
        (declared({"anyOf": [{"type": "string"}]}), "anyOf"),
        ([{"note": "for sailors", **declared({})[0]}], "tools[0].note"),
    ],
)
def test_words_of_a_tools_declaration_are_shown_to_the_model_or_refused(tokenizer, tools, unseen):
    found = read(tokenizer, [user("a"), model("b")], SOME_OF_A_TOOL, tools=tools)
    if unseen is None:
        assert isinstance(found[0], Document)
        return
    ((_, problem),) = found
    assert unseen in str(problem)
    assert "does not show" in str(problem)
    key = str(problem).partition("or name ")[2].partition(" in data.ignore")[0]
    assert isinstance(read(tokenizer, [user("a"), model("b")], SOME_OF_A_TOOL, tools=tools, ignore=[key])[0], Document)


def test_a_misspelled_variable_of_the_template_is_named(tokenizer):
    template = GEMMA + "{% if enable_thinking %}T{% endif %}"
    with pytest.raises(UserError, match=r"has enabel_thinking, which .* Did you mean enable_thinking"):
        read(tokenizer, CHAT, template, variables={"enabel_thinking": True})
    assert isinstance(read(tokenizer, CHAT, template, variables={"enable_thinking": False})[0], Document)
