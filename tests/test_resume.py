"""A killed run goes on as if nothing had happened: same command, same losses, bit for bit.

On another topology it goes on in `test_topologies.py`, bit for bit whatever it trains in `test_offload.py`.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_dgemma.checkpoint.manifest import read_state
from ds_dgemma.checkpoint.run_state import step_directories
from ds_dgemma.data.sudoku import write_sudoku
from ds_dgemma.errors import EXIT_USER_ERROR
from tests.training import read_metrics, start_ranks, train

pytestmark = pytest.mark.slow

STEPS = ["train.max_steps=6", "checkpoint.every=2", "optimizer.warmup_steps=2", "optimizer.lr=2e-3"]
SPREAD = ["parallel.expert_parallel_size=2", "train.micro_batch_size=2"]  # on 2 ranks: accumulation 2
NUMBERS = ("step", "loss", "loss_diffusion", "loss_ar", "grad_norm", "lr", "samples", "tokens")


def numbers(metrics: list[dict]) -> list[tuple]:
    return [tuple(record[name] for name in NUMBERS) for record in metrics]


def test_a_run_killed_at_its_second_checkpoint_continues_bit_for_bit(sudoku_run, tmp_path):
    """In bf16, with masters and moments beside the weights; on a mixture that is streamed and packed, in the middle of
    its blocks. `test_stop.py` and `test_faults.py` do it in fp32, on a file that was read before.
    """
    write_sudoku(4, "train", 10, 3, tmp_path / "other.jsonl")
    mixture = f"data.train=[{{path: {sudoku_run.parent}/train.jsonl, weight: 2}}, {tmp_path}/other.jsonl]"
    streamed = ["data.streaming=true", "data.shuffle_buffer=25", "data.packing=true", "data.max_length=100"]
    overrides = [*STEPS, *SPREAD, "train.precision=bf16", mixture, *streamed]
    undisturbed = train(sudoku_run, tmp_path / "undisturbed", overrides, processes=2)

    killed, ahead = tmp_path / "killed", ["data.workers=1"]
    ranks = start_ranks(sudoku_run, [f"run.dir={killed}", *overrides, *ahead], 2, tmp_path / "killed.log")
    wait_for_step(killed, 4, ranks)  # its checkpoint comes next, is being written, or is whole
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
        rank.wait()
    whole = [path.name for path in sorted((killed / "checkpoints").glob("step-*[0-9]"))]
    assert whole in (["step-000002"], ["step-000004"], ["step-000002", "step-000004"])

    assert numbers(train(sudoku_run, killed, [*overrides, *ahead], processes=2)) == numbers(undisturbed)
    assert final_state(killed) == final_state(tmp_path / "undisturbed")
    assert f"step {int(whole[-1][-6:])}" in (tmp_path / "killed.log").read_text()


def test_a_finished_run_changes_nothing_and_a_damaged_newest_checkpoint_is_passed_over(sudoku_run, tmp_path):
    run_dir = tmp_path / "run"
    undisturbed = train(sudoku_run, run_dir, STEPS)
    (run_dir / "complete.json").unlink()  # killed between its last checkpoint and this
    assert train(sudoku_run, run_dir, STEPS) == undisturbed
    assert json.loads((run_dir / "complete.json").read_text()) == {"step": 6}

    shard = next((run_dir / "checkpoints" / "step-000006").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 1
    shard.write_bytes(content)
    assert numbers(train(sudoku_run, run_dir, STEPS)) == numbers(undisturbed)
    assert "step-000006 is damaged" in run_dir.with_suffix(".log").read_text()


def wait_for_step(run_dir: Path, step: int, ranks: list) -> None:
    """Return as soon as metrics.jsonl has a step."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        assert all(rank.poll() is None for rank in ranks), "a rank ended before it was killed"
        metrics = run_dir / "metrics.jsonl"
        if metrics.exists() and sum('"kind"' not in line for line in metrics.read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {read_metrics(run_dir)[-1:]}")


def final_state(run_dir: Path) -> dict[str, bytes]:
    """The last checkpoint's files."""
    last = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    files = json.loads((last / "state.json").read_text())["files"]
    return {name: (last / name).read_bytes() for name in files}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own; `resize` makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or resize(folder, "26m", "size") != 0:
        pytest.skip("a small tmpfs needs the right to mount one")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def resize(folder: Path, size: str, option: str = "remount,size") -> int:
    command = ["mount", "-t", "tmpfs", "-o", f"{option}={size}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode


def test_a_full_disk_is_told_and_the_run_goes_on_from_what_was_written_before(disk, sudoku_run, tmp_path):
    held_out = f"data.validation={sudoku_run.parent}/train.jsonl"
    overrides = ["train.max_steps=3", "checkpoint.every=1", "checkpoint.keep_last=1", "checkpoint.keep_best=1"]
    overrides += ["checkpoint.on_error=continue", "validation.every=1", "validation.examples=8", held_out]
    run_dir, log = disk / "run", tmp_path / "log"
    (rank,) = start_ranks(sudoku_run, [f"run.dir={run_dir}", *overrides], 1, log)
    assert rank.wait(timeout=900) == EXIT_USER_ERROR, log.read_text()
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-000001"]
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    (failed,) = [record for record in records if record.get("kind") == "checkpoint_failed"]
    assert failed["step"] == 2  # the third and last one's failure ends the run
    assert "No space left on device" in failed["error"]
    text = log.read_text()
    assert "Traceback" not in text
    assert [text.count(f"the checkpoint {run_dir}/checkpoints/step-00000{step} ") for step in (2, 3)] == [1, 1], text

    assert resize(disk, "90m") == 0
    assert [record["step"] for record in train(sudoku_run, run_dir, overrides)] == [1, 2, 3]
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert records[0] == {"kind": "start", "step": 0, "full_attention": "sdpa", "sliding_attention": "sdpa"}
    assert [record["step"] for record in records if record.get("kind") == "start"] == [0, 1]
    losses = {record["step"]: record["loss"] for record in records if record.get("kind") == "validation"}
    best = min(losses, key=losses.__getitem__)
    kept = step_directories(run_dir / "checkpoints")
    assert [step for step, _ in kept] == sorted({best, 3})
    state = read_state(kept[-1][1])
    assert (state["score"]["value"], state["best"]["value"], state["best"]["step"]) == (losses[3], losses[best], best)
