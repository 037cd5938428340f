"""Columns by name, and templates of them."""

import pytest

from ds_dgemma.config.data import ColumnsSection
from ds_dgemma.data.formats import Conversation, Layout, read_row

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("columns", "row", "messages"),
    [
        ({"prompt": "question", "response": "answer"}, {"question": "q", "answer": "a"}, [USER, ANSWER]),
        (
            {"prompt": "{question}\n{context} {{n}}", "response": "answer", "system": "role", "history": "before"},
            {"question": "q", "context": 7, "answer": "a", "role": "s", "before": [["q0", "a0"]]},
            [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "q0"},
                {"role": "assistant", "content": "a0"},
                {"role": "user", "content": "q\n7 {n}"},
                ANSWER,
            ],
        ),
        ({"prompt": "p", "response": "r"}, {"p": [USER], "r": [ANSWER]}, [USER, ANSWER]),
        ({"prompt": "text", "response": "text"}, {"text": "q"}, [USER, {"role": "assistant", "content": "q"}]),
    ],
)
def test_columns_are_named_or_filled_into_templates(columns, row, messages):
    assert read_row(row, Layout(columns=ColumnsSection(**columns))) == (
        Conversation(messages, [None] * len(messages)),
        [],
    )
