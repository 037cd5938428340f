"""Benchmarks run: equal work is compared, a step holds what was planned, transformers loads the random checkpoint."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DiffusionGemmaForBlockDiffusion

from ds_dgemma.checkpoint.weights import WeightReader
from tests.benchmarks.length import failures
from tests.benchmarks.real_checkpoint import make_checkpoint
from tests.forks import start
from tests.gpu import shapes

MUON = ["optimizer.type=muon", "train.gradient_clipping=0"]


def printed(folder: Path, benchmark: str, *arguments: object) -> str:
    """What a benchmark prints; its exit code, which must be 0, is its own judgement."""
    log = folder / f"{len(list(folder.iterdir()))}.log"
    with log.open("wb") as output:
        code = start([f"tests.benchmarks.{benchmark}", *map(str, arguments)], dict(os.environ), output).wait(900)
    assert code == 0, log.read_text()
    return log.read_text()


@pytest.mark.slow
def test_a_benchmark_step_computes_what_transformers_does_and_prints_the_ratios(tmp_path: Path) -> None:
    small = ["--prompt", "16", "--response", "64", "--batch", "2", "--vocabulary", "512", "--repeats", "1"]
    said = printed(tmp_path, "step", *small, "--steps", "1", "--checkpointing", "full")
    ratios = re.findall(r"/ transformers: CPU time (\S+), wall time (\S+), peak memory (\S+)", said)
    assert len(ratios) == 1
    assert all(float(ratio) > 0 for ratio in ratios[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "reuse", "overrides"),
    [
        (3, 1, ["train.activation_checkpointing=none", *MUON]),
        (
            3,
            1,
            [
                "train.activation_checkpointing=full",
                "lora={r: 8, target_parameters: [experts.gate_up_proj, experts.down_proj]}",
            ],
        ),
        (
            3,
            0,
            [
                "train.activation_checkpointing=selective",
                "model.freeze=['*.embed_tokens.weight', '*.self_conditioning.*', '*.layers.0.*']",
            ],
        ),
        (2, 1, ["train.precision=bf16"]),
    ],
    ids=["nothing again, Muon", "LoRA, experts too", "frozen parts, nothing reused", "stage 2"],
)
def test_a_step_holds_and_sends_what_was_planned(stage: int, reuse: int, overrides: list[str], tmp_path: Path) -> None:
    make_checkpoint(shapes.config(rehearse=True, layers=2), tmp_path / "model")
    zero = {"stage": stage, "reduce_bucket_size": 10**6}
    if stage == 3:
        # Nothing is kept gathered, or only for a use that follows at once, so that every gather of the plan is made.
        zero |= {"stage3_max_reuse_distance": reuse, "stage3_max_live_parameters": 0}
        zero |= dict.fromkeys(("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), 0)
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    ranks = ["--processes", "2", "--expert-parallel", "2", "--length", "128", "--accumulation", "2"]
    files = ["--model", tmp_path / "model", "--deepspeed", tmp_path / "zero.json"]
    settings = [word for override in overrides for word in ("--set", override)]
    said = printed(tmp_path, "memory", *files, *ranks, *settings)
    rows = dict(re.findall(r"\| sent: (\S+) \|.*\| (\S+)% \|", said))
    if stage == 3:
        # Muon fills up the smaller matrices of a round to the size of the largest
        assert abs(float(rows["all-gather"])) < (3 if MUON[0] in overrides else 1)
        assert abs(float(rows["reduce"])) < 1
        assert abs(float(rows["all-to-all"])) < 15  # the routing decides


@pytest.mark.slow
def test_memory_of_a_step_grows_with_its_length_and_not_its_square() -> None:
    def memory(length: int) -> float:  # in a process of its own: a fork has free memory of its parent's
        child = ["-m", "tests.benchmarks.length", "--child", "5 sliding : 1 full", str(length)]
        run = subprocess.run([sys.executable, *child], capture_output=True, text=True, check=True)
        return json.loads(run.stdout.splitlines()[-1])["memory"]

    assert memory(4096) / memory(2048) <= 2.5  # 1.9 to 2.0; one [T, T] in fp32 would make it 2.6, four of them 3.1


def test_a_step_that_grows_with_the_square_of_its_length_is_refused() -> None:
    def steps(power: int) -> dict[int, dict[str, float]]:
        return {n: {"memory": n**power, "seconds": n**power, "peak": 1, "full_flops": 1} for n in (2048, 4096)}

    assert not failures({"sliding only": steps(1), "5 sliding : 1 full": steps(1)})
    refused = failures({"sliding only": steps(2), "5 sliding : 1 full": steps(2)})
    assert [re.sub(r".* times the ", "", line) for line in refused] == [
        "memory, at most 2.1", "seconds, at most 2.2", "memory, at most 2.1",
    ]  # fmt: skip


@pytest.mark.slow
def test_every_value_that_two_ranks_load_equals_the_files(tmp_path: Path) -> None:
    said = printed(tmp_path, "load", "--check", "--miniature", "--dir", tmp_path / "model")
    assert len(re.findall(r"^\| 2 \| [12] \| [01] \|", said, re.MULTILINE)) == 4


def test_the_random_checkpoint_is_whole_and_the_same_however_it_is_sharded(tmp_path: Path) -> None:
    config = shapes.config(rehearse=True, layers=2)
    make_checkpoint(config, tmp_path / "one")
    make_checkpoint(config, tmp_path / "many", shard_gb=1e-4)
    one, many = WeightReader(tmp_path / "one"), WeightReader(tmp_path / "many")
    assert len(set(many.files.values())) > 2
    loaded: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path / "many", output_loading_info=True)
    model, info = loaded
    assert not any(info.values())
    for name, tensor in model.state_dict().items():
        if name in one:
            assert torch.equal(one.read(name), tensor)
            assert torch.equal(many.read(name), tensor)
    assert model.state_dict().keys() - one.files.keys() == set(model.all_tied_weights_keys)
