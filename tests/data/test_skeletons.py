"""Put together from a template's pieces, a rendering is the template's own, or the template is asked."""

import random

import pytest
from transformers.utils import chat_template_utils

from ds_dgemma.data.skeletons import Skeletons
from ds_dgemma.tools.tiny import TEXT_TEMPLATE
from tests.data.conftest import GEMMA

WORDS = ["tide", "pier", "user", "model", "o'clock", "<b>", "</think>", "hidden", "\n", "5", '"q"', "{y}", "system"]
LOOP = "{% for message in messages %}[{{ message.role }}]BODY{% endfor %}{{ 'model' if add_generation_prompt }}"
COPIES = {
    "gemma": GEMMA,
    "text": TEXT_TEMPLATE.read_text(),
    "thinking": LOOP.replace("BODY", "{{ message.content.split('</think>')[-1] | trim }}"),
    "conditional": LOOP.replace("BODY", "{{ 'secret' if 'hidden' in message.content else message.content }}"),
    "whole": LOOP.replace("BODY", "{{ 'T' if message.content == 'tide' else message.content }}"),
    "not empty": LOOP.replace("BODY", "{% if message.content | length > 0 %}{{ message.content }}{% endif %}"),
}
LOOKS_INSIDE = (
    "{{ message.content | upper }}",
    "{{ message.content.upper() }}",
    "{{ message.content[:5] }}",
    "{{ message.content.split() | first }}",
    "{{ message.content | replace('a', 'b') }}",
    "{{ message.content | tojson }}",
    "{% set said %}{{ message.content }}{% endset %}{{ said | lower }}",
    "{{ message.content if message.content | length < 100 else 'long' }}",
)


def random_messages(draw: random.Random) -> list[dict[str, str]]:
    roles = ["system"] * draw.randint(0, 1) + ["user", "assistant"] * draw.randint(1, 3)
    return [{"role": role, "content": " ".join(draw.choices(WORDS, k=draw.randint(1, 4)))} for role in roles]


@pytest.mark.parametrize("name", COPIES)
def test_a_rendering_from_pieces_is_the_templates(name: str):
    template, draw, known = chat_template_utils._compile_jinja_template(COPIES[name]), random.Random(0), 0
    skeletons = Skeletons(template, COPIES[name], {"bos_token": "<bos>"})
    for _ in range(300):
        messages, asks = random_messages(draw), draw.random() < 0.5
        seen = skeletons.render(messages, asks)
        if seen is not None:
            known += 1
            expected = template.render(messages=messages, add_generation_prompt=asks, bos_token="<bos>")
            assert seen == expected
    assert known > 50


@pytest.mark.parametrize("body", LOOKS_INSIDE)
def test_a_template_that_looks_into_contents_is_asked_each_time(body: str):
    source = LOOP.replace("BODY", body)
    skeletons = Skeletons(chat_template_utils._compile_jinja_template(source), source, {})
    assert skeletons.render([{"role": "user", "content": "At three by the pier"}], False) is None
