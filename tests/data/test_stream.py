"""The order of training, however it is shared out, and the processes that make it."""

import copy
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import psutil
import pytest

from ds_dgemma.config import DataSection
from ds_dgemma.data.sources import load_conversations
from ds_dgemma.data.stream import Stream, locate, prepare_examples
from ds_dgemma.errors import UserError

N = 10


def ids(examples):
    """Collate to what tells a sample and its epoch apart."""
    return [(example.sample_id, epoch, example.tokens_S.tolist()) for example, epoch in examples]


def refuse(examples):
    raise UserError("row 3: too odd\n  second line")


def write_chats(folder, count):
    path = folder / "chats.jsonl"
    with path.open("w") as file:
        for row in range(count):
            turns = [("user", f"question {row}"), ("assistant", "x" * (row + 1))]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def prepared(folder, tokenizer, count=N, **data):
    section = DataSection(train=str(write_chats(folder, count)), **data)
    conversations = load_conversations(section, "train")
    return prepare_examples(conversations, tokenizer, section, 8, tokenizer.eos_token_id, folder / "cache")


@pytest.fixture
def examples(tmp_path, tokenizer):
    return prepared(tmp_path, tokenizer)


def global_batches(examples, steps, world=1, micro=2, start=0, workers=0):
    """Put the ranks' micro-batches of each step together as the optimizer sees them."""
    ranks = [
        Stream(
            examples=examples,
            collate=ids,  # pyright: ignore[reportArgumentType]
            seed=5,
            global_batch_size=8,
            micro_batch_size=micro,
            rank=rank,
            world_size=world,
            start_step=start,
            workers=workers,
        )
        for rank in range(world)
    ]
    steps_of_ranks = zip(*(islice(iter(stream), steps) for stream in ranks), strict=True)
    return [
        [sample for micro_batches in zip(*ranks, strict=True) for batch in micro_batches for sample in batch]
        for ranks in steps_of_ranks
    ]


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (2, 4), (4, 1), (2, 2), (8, 1)])
def test_a_global_batch_is_the_same_however_it_is_split(examples, world, micro):
    assert global_batches(examples, 4, world, micro) == global_batches(examples, 4)


def test_starting_at_a_step_equals_never_stopping(examples):
    assert global_batches(examples, 3, start=4) == global_batches(examples, 7)[4:]


def test_workers_make_the_same_batches_as_none(examples):
    assert global_batches(examples, 3, start=1, workers=2) == global_batches(examples, 3, start=1)


def test_every_epoch_visits_every_sample_once_in_its_own_order():
    epochs = [[locate(5, epoch * N + place, N) for place in range(N)] for epoch in range(3)]
    assert [sorted(order) for order in epochs] == [[(i, epoch) for i in range(N)] for epoch in range(3)]
    orders = [[index for index, _ in order] for order in epochs]
    assert orders[0] != orders[1] != orders[2]
    assert [locate(6, place, N)[0] for place in range(N)] != orders[0]


def test_the_order_of_a_seed_never_changes():
    assert [locate(0, place, 8) for place in range(6, 10)] == [(0, 0), (2, 0), (4, 1), (7, 1)]


@pytest.mark.parametrize(
    ("over_length", "counts"),
    [("drop", (6, 4, 0)), ("truncate", (10, 0, 4))],
)
def test_what_the_length_policy_did_is_counted(tmp_path, tokenizer, over_length, counts):
    examples = prepared(tmp_path, tokenizer, max_length=41, over_length=over_length)
    report = examples.report
    assert (report.kept, report.dropped, report.truncated) == counts
    assert len(examples) == report.kept
    assert max(len(examples[index].tokens_S) for index in range(len(examples))) <= 41
    assert f"kept {counts[0]} of 10 examples" in str(report)


def test_too_long_examples_name_their_rows_or_leave_nothing(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"4 examples (?s:.*)chats\.jsonl:7: prompt"):
        prepared(tmp_path, tokenizer, max_length=41, over_length="error")
    with pytest.raises(UserError, match=r"no example fits data\.max_length 9; the shortest takes 34 tokens"):
        prepared(tmp_path, tokenizer, max_length=9)


def test_tokens_are_kept_until_data_or_template_change(tmp_path, tokenizer):
    def folders():
        return {path for path in (tmp_path / "cache").iterdir() if path.is_dir()}

    prepared(tmp_path, tokenizer)
    first = folders()
    prepared(tmp_path, tokenizer, max_length=64)
    assert folders() == first
    prepared(tmp_path, tokenizer, count=N + 1)
    tokenizer.chat_template += " "
    changed = prepared(tmp_path, tokenizer, count=N + 1)
    assert len(folders()) == 3
    assert len(changed) == N + 1


@pytest.mark.parametrize("locks", [True, False])
def test_ranks_that_tokenize_at_once_agree_and_leave_no_debris(tmp_path, tokenizer, monkeypatch, locks):
    section = DataSection(train=str(write_chats(tmp_path, N)))
    conversations = load_conversations(section, "train")
    cache = tmp_path / "cache"
    together = threading.Barrier(4, timeout=60)

    def no_locks(file, operation):
        together.wait()
        raise OSError("no locks here")

    if not locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)

    def rank(own_tokenizer):
        return prepare_examples(conversations, own_tokenizer, section, 8, own_tokenizer.eos_token_id, cache)

    with ThreadPoolExecutor(4) as pool:
        sets = list(pool.map(rank, [copy.deepcopy(tokenizer) for _ in range(4)]))
    assert len({examples[N - 1].tokens_S.tobytes() for examples in sets}) == 1
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


def test_a_batch_that_ranks_cannot_share_is_refused(examples):
    with pytest.raises(UserError, match=r"2 x 3 = 6\. Use 6 or 12"):
        Stream(
            examples=examples,
            collate=ids,  # pyright: ignore[reportArgumentType]
            seed=0,
            global_batch_size=8,
            micro_batch_size=2,
            world_size=3,
        )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_users_mistake_in_a_worker_keeps_its_text(examples, workers):
    stream = Stream(examples=examples, collate=refuse, seed=0, global_batch_size=2, micro_batch_size=2, workers=workers)
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
