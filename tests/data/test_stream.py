"""The order of training, however it is shared out, its rows read before or meanwhile; the processes that make it."""

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import psutil
import pytest

from ds_dgemma.data.split import order_of
from ds_dgemma.data.stream import Share, Stream
from ds_dgemma.data.streaming import Cursor, StreamedBatches
from ds_dgemma.errors import UserError
from tests.data.reading import chats, read, read_stream, settings, write_rows

N = 10


def ids(examples):
    """Collate to what tells a sample and its epoch apart."""
    return [(example.sample_id, epoch, example.tokens_S.tolist()) for example, epoch in examples]


def refuse(examples):
    raise UserError("row 3: too odd\n  second line")


@pytest.fixture
def path(tmp_path):
    return write_rows(tmp_path / "chats.jsonl", chats(N))


@pytest.fixture
def batches_of(tmp_path, tokenizer):
    """Make a rank's batches."""

    def batches_of(config, share, start=0, workers=0, cursor=None):
        if config.data.streaming:
            examples = read_stream(config, tokenizer)
            cursor = Cursor.read(cursor) if cursor else examples.begin
            return StreamedBatches(examples=examples, collate=ids, share=share, cursor=cursor, workers=workers)
        examples = read(config, tokenizer, tmp_path / "cache")
        order = order_of(config, examples)
        return Stream(examples=examples, order=order, collate=ids, share=share, workers=workers, start_step=start)

    return batches_of


@pytest.fixture
def global_batches(batches_of):
    """Put the ranks' micro-batches of each step together as the optimizer sees them."""

    def global_batches(config, steps, world=1, micro=2, **more):
        shares = [Share(config.train.global_batch_size, micro, rank, world) for rank in range(world)]
        ranks = [iter(batches_of(config, share, **more)) for share in shares]
        steps_of_ranks = zip(*(islice(batches, steps) for batches in ranks), strict=True)
        return [
            [sample for micro_batches in zip(*of_ranks, strict=True) for batch in micro_batches for sample in batch]
            for of_ranks in steps_of_ranks
        ]

    return global_batches


@pytest.mark.parametrize("data", [{}, {"packing": True, "max_length": 60}, {"streaming": True}], ids=str)
@pytest.mark.parametrize(("world", "micro"), [(1, 8), (2, 4), (4, 1), (2, 2), (8, 1)])
def test_a_global_batch_is_the_same_however_it_is_split(global_batches, path, world, micro, data):
    config = settings(path, **data)
    assert global_batches(config, 4, world, micro) == global_batches(config, 4)


@pytest.mark.parametrize("data", [{}, {"packing": True, "max_length": 80}, {"group_by_length": True}], ids=str)
def test_starting_at_a_step_equals_never_stopping_and_streaming_equals_reading_before(global_batches, path, data):
    before, meanwhile = settings(path, **data), settings(path, **data, streaming=True)
    expected = global_batches(before, 7)
    assert global_batches(before, 3, start=4) == expected[4:]
    assert global_batches(meanwhile, 7) == expected
    assert len({sample for batch in expected for sample, *_ in batch}) == N


def test_workers_make_the_same_batches_as_none(global_batches, path):
    config, meanwhile = settings(path), settings(path, streaming=True)
    assert global_batches(config, 3, start=1, workers=2) == global_batches(config, 3, start=1)
    assert global_batches(meanwhile, 3, workers=2) == global_batches(config, 3)


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_goes_on_from_its_cursor_in_a_mixture_and_in_the_middle_of_a_block(
    batches_of, tmp_path, path, packing
):
    """Blocks of 6 rows of which two thirds are the first source's, so both begin again within a few steps."""
    other = write_rows(tmp_path / "other.jsonl", chats(3))
    mixture = [{"path": str(path), "weight": 2}, str(other)]
    config = settings(mixture, batch=4, streaming=True, shuffle_buffer=6, packing=packing, max_length=70)
    batches = batches_of(config, Share(4, 2))
    steps, cursors = [], []
    for step in islice(batches, 12):
        steps.append(step)
        cursors.append(batches.cursor.facts())
    seen = [sample[:2] for step in steps[:6] for batch in step for sample in batch]
    assert len(set(seen)) == len(seen)  # nothing twice in an epoch of its source
    assert {sample >> 40 for sample, _ in seen} == {0, 1}
    assert any(cursor["used"] > 0 for cursor in cursors)
    for step in (2, 3, 8):
        resumed = batches_of(config, Share(4, 2), cursor=cursors[step])
        assert list(islice(resumed, 3)) == steps[step + 1 : step + 4]


def test_a_stream_begins_again_in_another_order_and_every_epoch_has_every_row(batches_of, path):
    batches = batches_of(settings(path, batch=2, streaming=True, shuffle_buffer=4), Share(2, 2))
    seen = [sample[:2] for step in islice(batches, 10) for batch in step for sample in batch]
    assert [sorted(seen[:10]), sorted(seen[10:])] == [[(row, epoch) for row in range(N)] for epoch in range(2)]
    assert [row for row, _ in seen[:10]] != [row for row, _ in seen[10:]]
    assert {row for row, _ in seen[:4]} == {0, 1, 2, 3}  # a block at a time


def test_a_bad_row_of_a_stream_is_named_or_left_out(batches_of, tmp_path):
    rows = chats(4)
    rows[2]["messages"][1]["content"] = ""
    path = write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(UserError, match=r"bad\.jsonl:3: messages\[1\].* empty"):
        next(iter(batches_of(settings(path, streaming=True), Share(2, 2))))
    batches = batches_of(settings(path, streaming=True, invalid="drop"), Share(2, 2))
    assert {sample for step in islice(batches, 6) for batch in step for sample, *_ in batch} == {0, 1, 3}
    none = settings(path, streaming=True, invalid="drop", max_length=9)
    with pytest.raises(UserError, match=r"no example .* can be trained on"):
        next(iter(batches_of(none, Share(2, 2))))


def test_a_stream_tells_of_dropped_rows_and_unread_keys_once(tmp_path, tokenizer, caplog):
    rows = [row | {"source": "s"} for row in chats(8)]
    rows[2]["messages"][1]["content"] = rows[5]["messages"][1]["content"] = ""
    path = write_rows(tmp_path / "bad.jsonl", rows)
    config = settings(path, streaming=True, invalid="drop", shuffle_buffer=4)
    examples = replace(read_stream(config, tokenizer), tells=True)
    for _ in islice(examples.rows(examples.begin), 20):
        pass
    assert [record.message.partition(", the first")[0] for record in caplog.records] == [
        f"{path}: not read: source",
        f"{path}: 1 row dropped (1 of 4 so far)",
        f"{path}: 1 row dropped (2 of 8 so far)",
    ]


def test_what_workers_get_is_small(tmp_path, path, tokenizer):
    examples = read(settings(path), tokenizer, tmp_path / "cache")
    assert examples[3].tokens_S.tolist()
    assert len(pickle.dumps(examples)) < 20_000  # tokens and tables stay on disk


@pytest.mark.parametrize("workers", [0, 1])
def test_a_users_mistake_in_a_worker_keeps_its_text(tmp_path, path, tokenizer, workers):
    config = settings(path)
    examples = read(config, tokenizer, tmp_path / "cache")
    stream = Stream(
        examples=examples, order=order_of(config, examples), collate=refuse, share=Share(2, 2), workers=workers
    )
    with pytest.raises(UserError) as error:
        next(iter(stream))
    assert str(error.value) == "row 3: too odd\n  second line"


KILLED = """
import itertools, sys, torch
from ds_dgemma.data.workers import map_in_order
if __name__ == "__main__":
    results = map_in_order(torch.zeros, itertools.repeat(1000), workers=2)
    next(results)
    print("started", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_workers_end_when_their_rank_is_killed(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(KILLED)
    root = Path(__file__).parents[2]
    rank = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert rank.stdout is not None
    assert rank.stdout.readline() == b"started\n"
    children = psutil.Process(rank.pid).children(recursive=True)
    assert len(children) >= 3  # the server and two workers
    rank.send_signal(signal.SIGKILL)
    rank.wait()
    deadline = time.monotonic() + 60
    while any(child.is_running() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [child for child in children if child.is_running()]
