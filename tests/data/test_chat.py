"""Where the response starts and ends, for templates of several manners and without generation tags."""

import json

import pytest

from ds_dgemma.config import DataSection
from ds_dgemma.data.chat import MAX_TURNS, tokenize_turns
from ds_dgemma.data.sources import load_conversations
from ds_dgemma.errors import UserError
from tests.data.conftest import GEMMA

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": " first "},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "second"},
]
EMPTY_THOUGHT = GEMMA.replace("'<|turn>model\\n' }}{% endif", "'<|turn>model\\n<|channel>T\\n<channel|>' }}{% endif")
PLAIN = (
    "{% for message in messages %}{{ message.role + ':' + message.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
THOUGHT_IN_TURN = GEMMA.replace(
    "message.content | trim", "('<channel|>' if message.role == 'assistant' else '') + message.content | trim"
)
REWRITES = "{{ messages | length }}" + GEMMA


@pytest.fixture
def turns_of(tmp_path, tokenizer):
    """Return a function: the learned turns of one conversation."""

    def turns_of(messages, template=GEMMA, assistant_turns="last"):
        path = tmp_path / "chats.jsonl"
        path.write_text(json.dumps({"messages": messages}) + "\n")
        tokenizer.chat_template = template
        conversations = load_conversations(DataSection(train=str(path)), "train")
        return tokenize_turns(conversations, range(1), tokenizer, assistant_turns)

    return turns_of


@pytest.mark.parametrize(
    ("template", "response"),
    [
        (GEMMA, "second<turn|>"),  # the newline that separates turns is not learned
        (EMPTY_THOUGHT, "second<turn|>"),  # the generation prompt says more than a rendered turn
        (THOUGHT_IN_TURN, "<channel|>second<turn|>"),  # a rendered turn says more than the prompt
        (PLAIN, "second\n"),  # no special token ends the turn: its text is kept
    ],
)
def test_the_prompt_is_what_generate_sees_and_the_response_the_rest_of_the_turn(
    turns_of, tokenizer, template, response
):
    (turn,) = turns_of(CHAT, template)
    for_generate = tokenizer.apply_chat_template(CHAT[:-1], add_generation_prompt=True, return_dict=False)
    assert turn.prompt_ids == for_generate
    assert tokenizer.decode(turn.response_ids) == response


def test_all_turns_are_learned_each_without_those_after_it(turns_of, tokenizer):
    first, second = turns_of(CHAT, assistant_turns="all")
    assert [tokenizer.decode(turn.response_ids) for turn in (first, second)] == [
        "first<turn|>",
        "second<turn|>",
    ]
    assert "two" not in tokenizer.decode(first.prompt_ids)
    assert [first.sample_id, second.sample_id] == [0, 1]
    with pytest.raises(UserError, match="at most 1024"):
        turns_of(CHAT[1:3] * (MAX_TURNS + 1), assistant_turns="all")


def test_a_token_that_would_straddle_the_border_is_not_made(turns_of, tokenizer):
    tokenizer.add_tokens([":x"])
    (turn,) = turns_of([CHAT[1], {"role": "assistant", "content": "xy"}], PLAIN)
    assert tokenizer.convert_ids_to_tokens(turn.prompt_ids)[-1] == ":"
    assert tokenizer.convert_ids_to_tokens(turn.response_ids) == ["x", "y", "\n"]


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (None, "no chat template"),
        (REWRITES, "renders this conversation differently"),
        ("{{ raise_exception('roles must alternate') }}", "refuses this conversation: roles must alternate"),
        ("{{ messages[0].content + 1 }}", "refuses this conversation"),
        ("{{ messages[0].content }}", "writes nothing for the answer"),
    ],
)
def test_a_template_that_cannot_serve_is_refused_with_the_row(turns_of, template, found):
    with pytest.raises(UserError, match=rf"chats\.jsonl:1: .*{found}"):
        turns_of(CHAT, template)
