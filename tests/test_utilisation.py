"""`mfu` is of the tokens that a step read, however they were split; without a known peak there is none."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ds_dgemma.config.run import ObjectiveSection
from ds_dgemma.objective.collate import collate
from ds_dgemma.objective.corruption import Corruption
from ds_dgemma.run.utilisation import documents_of
from tests.reference.examples import one_answer
from tests.training import make_run, train


def test_an_idle_first_guess_is_no_work() -> None:
    corruption = Corruption(ObjectiveSection(canvases_per_example="all"), seed=0, vocab_size=16)
    long, short = (one_answer(0, np.ones(size), prompt, 4, eos_id=1) for size, prompt in ((14, 6), (7, 3)))
    batch = collate(corruption, [(long, 0), (short, 0)])
    coins = torch.tensor([False, True, True])
    assert list(documents_of([batch.with_coins(coins)])) == [(14, [6, 10], [10]), (7, [3], [3])]
    idle = batch.with_coins(torch.zeros_like(coins))  # one guess is made all the same
    assert list(documents_of([idle])) == [(14, [6, 10], []), (7, [3], [])]


@pytest.mark.slow
def test_the_work_is_that_of_the_global_batch_on_any_topology(tmp_path: Path) -> None:
    config, work = make_run(tmp_path, top_k=2), []
    for processes, micro in ((1, 8), (2, 2)):
        settings = ["train.max_steps=2", f"train.micro_batch_size={micro}", "tracking.peak_tflops=0.1"]
        steps = train(config, tmp_path / f"run-{processes}", settings, processes)
        assert all(0 < step["mfu"] < 1 for step in steps)
        work.append([step["mfu"] * step["seconds"] * processes for step in steps])
    assert work[0] == pytest.approx(work[1], rel=1e-12)
