"""NaN on one rank: the step is skipped by all, as if the run were without it; it can be replayed; too many end the
run.
"""

import json
from pathlib import Path

import pytest

from ds_dgemma.cli import main
from ds_dgemma.data.order import permutation
from ds_dgemma.errors import EXIT_BAD_NUMBERS, EXIT_USER_ERROR
from tests.test_resume import final_state, numbers
from tests.training import start_module, start_ranks, train

slow = pytest.mark.slow

EXAMPLES, BATCH, MICRO = 64, 8, 2  # on 2 ranks: accumulation 2
RUN = [
    "parallel.expert_parallel_size=2", f"train.micro_batch_size={MICRO}", "train.max_steps=4", "checkpoint.every=2",
    "optimizer.warmup_steps=2", "optimizer.lr=2e-3",
]  # fmt: skip
BAD_STEP, BAD_RANK, BAD_MICRO_BATCH = 3, 1, 0


def examples_of(step: int) -> list[int]:
    positions = range((step - 1) * BATCH, step * BATCH)
    return [int(permutation(EXAMPLES, "order", 0, p // EXAMPLES)[p % EXAMPLES]) for p in positions]


BAD = examples_of(BAD_STEP)[(BAD_MICRO_BATCH * 2 + BAD_RANK) * MICRO]


def records(run_dir: Path, kind: str) -> list[dict]:
    found = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record for record in found if record.get("kind") == kind]


@slow
def test_a_bad_loss_on_one_rank_leaves_one_update_out_on_all_and_replays(sudoku_run, tmp_path, capsys):
    run_dir = tmp_path / "poisoned"
    poisoned = ("tests.poisoned", "loss", str(BAD))
    seen = train(sudoku_run, run_dir, RUN, processes=2, program=(*poisoned, "train"))
    without = train(
        sudoku_run, tmp_path / "without", RUN, processes=2, program=("tests.poisoned", "omit", str(BAD_STEP), "train")
    )
    others = [step for step in range(4) if step != BAD_STEP - 1]
    assert [numbers(seen)[step] for step in others] == [numbers(without)[step] for step in others]
    assert final_state(run_dir) == final_state(tmp_path / "without")
    assert seen[BAD_STEP - 1]["not_finite"]["loss"] == "nan"
    state = json.loads((run_dir / "checkpoints/step-000004/state.json").read_text())
    assert (state["adam_step"], state["bad_steps_in_a_row"]) == (3, 0)

    (told,) = records(run_dir, "skipped")
    assert told["where"].startswith(f"rank {BAD_RANK} micro-batch {BAD_MICRO_BATCH}, examples ")
    assert str(BAD) in told["where"].split()
    assert run_dir.with_suffix(".log").read_text().count("skipped at step 3") == 1

    moved = tmp_path / "moved"  # a run directory may be copied to where the fault is looked for
    run_dir.rename(moved)
    log = tmp_path / "replayed.log"
    (replayed,) = start_module([*poisoned, "replay", str(moved / "replay/step-000003.json")], 1, log)
    assert replayed.wait(400) == 0, log.read_text()
    lines = log.read_text().splitlines()
    assert any(line.endswith("step-000002") and "skipped for its loss" in line for line in lines)
    assert lines[-1] == f"Reproduced: rank {BAD_RANK} micro-batch {BAD_MICRO_BATCH}, example {BAD}."
    for line in lines:  # computed alone, each micro-batch has the loss that it had among ranks and split experts
        if line.startswith("rank") and "nan" not in line:
            now, then = line.split()[5], line.split()[-1].rstrip(")")
            assert float(now) == pytest.approx(float(then), abs=2e-4)

    checkpoint = moved / "checkpoints/step-000002"  # NaN of a damaged checkpoint would be no reproduction
    file = next(checkpoint.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x40
    file.write_bytes(content)
    assert main(["replay", str(moved / "replay/step-000003.json"), "--checkpoint", str(checkpoint)]) == EXIT_USER_ERROR
    assert "step-000002 is damaged" in capsys.readouterr().err


@slow
def test_one_infinite_number_in_a_rank_s_experts_is_a_bad_step_and_too_many_in_a_row_end_the_run(sudoku_run, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}  # where DeepSpeed alone would never take a step again
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}))
    bad = ",".join(str(examples_of(step)[-1]) for step in (2, 4, 5))  # rank 1's
    settings = ["train.precision=bf16", f"deepspeed={tmp_path}/zero.json", "health.max_bad_steps=2"]

    def codes(processes: int, *more: str) -> list[int]:
        overrides = [f"run.dir={run_dir}", *RUN, "train.max_steps=6", *settings, *more]
        ranks = start_ranks(sudoku_run, overrides, processes, log, ("tests.poisoned", "experts", bad, "train"))
        try:
            return [rank.wait(400) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()

    assert codes(2) == [EXIT_BAD_NUMBERS] * 2, log.read_text()
    told = records(run_dir, "skipped")
    assert [(record["step"], record["in_a_row"]) for record in told] == [(2, 1), (4, 1), (5, 2)]
    assert {record["problem"] for record in told} == {"the gradient of a finite loss"}
    (last,) = [line for line in log.read_text().splitlines() if line.startswith("stopped at step 5")]
    assert str(run_dir / "checkpoints/step-000004") in last
    assert str(run_dir / "replay/step-000005.json") in last

    # From step 4 on, where one was counted already: it ends where it ended.
    assert codes(1, "parallel.expert_parallel_size=1") == [EXIT_BAD_NUMBERS]
    assert records(run_dir, "skipped") == told
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == ["step-000002", "step-000004"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "No such file"),
        (b"\xff\xfe", "cannot be read"),
        (b"{", "no replay file"),
        (b"[]", "no replay file"),
        (b'{"step": 3}', "problem: Field required"),
        (b'{"step": "x"}', "step = 'x'"),
    ],
    ids=["missing", "no text", "cut", "no object", "no problem", "no number"],
)
def test_a_file_that_is_none_is_refused_in_a_line(text, told, tmp_path, capsys):
    file = tmp_path / "step-000003.json"
    if text is not None:
        file.write_bytes(text)
    assert main(["replay", str(file)]) == EXIT_USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert str(file) in line
    assert told in line
