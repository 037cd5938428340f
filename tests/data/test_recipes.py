"""Put together from a template's pieces, documents are those of the template itself, or the template is asked."""

import random

import pytest
from transformers import PreTrainedTokenizerFast

from ds_dgemma.data.chat import Document, tokenize_rows
from ds_dgemma.data.drafter import Drafter
from ds_dgemma.data.formats import BadRow, Conversation
from ds_dgemma.tools.tiny import TEXT_TEMPLATE
from tests.data.conftest import GEMMA

WORDS = ["tide", "pier", "user", "model", "o'clock", "<b>", "</think>", "hidden", "\n", "5", '"q"', "{y}", "system"]
LOOP = "{% for message in messages %}[{{ message.role }}]BODY{% endfor %}{{ '[assistant]' if add_generation_prompt }}"
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


def random_conversation(draw: random.Random) -> Conversation:
    roles = ["system"] * draw.randint(0, 1) + ["user", "assistant"] * draw.randint(1, 3)
    messages = [{"role": role, "content": " ".join(draw.choices(WORDS, k=draw.randint(1, 4)))} for role in roles]
    weights = [draw.choice((None, 0.0, 0.5)) if role == "assistant" else None for role in roles]
    return Conversation(messages, weights)


@pytest.mark.parametrize("learn", ["last", "all"])
@pytest.mark.parametrize("name", COPIES)
def test_documents_from_pieces_are_the_templates(gemma_tokenizer: PreTrainedTokenizerFast, name: str, learn):
    gemma_tokenizer.chat_template = COPIES[name]
    drafter, draw, known = Drafter(gemma_tokenizer, learn, "error", {}), random.Random(0), 0
    for _ in range(200):
        data = random_conversation(draw)
        try:
            long = drafter._by(data, None) if drafter._template else drafter.drafts(data)
        except BadRow:
            continue
        assert drafter._recipes
        if (short := drafter._recipes.drafts(data)) is None:
            continue
        known += 1
        for one, other in zip(short, long, strict=True):
            assert (one.last, one.earlier, one.unlearned) == (other.last, other.earlier, other.unlearned)
        tokens = tokenize_rows([(0, data)], drafter)
        recipes, drafter._recipes.drafts = drafter._recipes.drafts, lambda data: None
        assert tokens == tokenize_rows([(0, data)], drafter)
        drafter._recipes.drafts = recipes
        assert all(isinstance(document, Document) for document in tokens)
    assert known > 30


@pytest.mark.parametrize("body", LOOKS_INSIDE)
def test_a_template_that_looks_into_contents_is_asked_each_time(gemma_tokenizer: PreTrainedTokenizerFast, body: str):
    gemma_tokenizer.chat_template = LOOP.replace("BODY", body)
    drafter = Drafter(gemma_tokenizer, "last", "error", {})
    data = Conversation(
        [{"role": "user", "content": "At three"}, {"role": "assistant", "content": "By the pier"}], [None, None]
    )
    tokenize_rows([(0, data)], drafter)
    assert drafter._recipes
    assert drafter._recipes.drafts(data) is None
