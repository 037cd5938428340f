"""A spike is told once it is far out of what the losses before it were, and noise and slopes are none."""

import json
import math
import random

from ds_dgemma.config.run import HealthSection
from ds_dgemma.tracking.spikes import SpikeDetector, past_losses


def spikes(losses: list[float], past: tuple[float, ...] = (), **health: float) -> list[int]:
    detector = SpikeDetector(HealthSection.model_validate(health), past)
    return [step for step, loss in enumerate(losses) if detector.look(step, loss)]


def falling(count: int, deviation: float = 0.03) -> list[float]:
    """A curve like the demo's: 3 to 0.5, a few per cent of noise."""
    draw = random.Random(0)
    return [(0.5 + 2.5 * math.exp(-step / 100)) * (1 + draw.gauss(0, deviation)) for step in range(count)]


def test_noise_and_slope_are_no_spikes():
    assert spikes(falling(2000)) == []
    assert spikes([0.5] * 200) == []


def test_a_jump_is_one_and_does_not_hide_the_next():
    losses = falling(600)
    losses[300] *= 2
    losses[303] = 1e9
    losses[400] = math.nan
    assert spikes(losses) == [300, 303]
    assert spikes(losses, spike_factor=0) == []


def test_a_lasting_jump_ends_being_one():
    told = spikes([1.0, 1.01] * 100 + [2.0, 2.01] * 100)
    assert told[:3] == [200, 201, 202]
    assert len(told) <= 26  # half the window


def test_a_resumed_run_measures_against_what_it_did_before(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    assert past_losses(metrics, 100) == []
    records = [{"step": step, "loss": 0.5} for step in range(1, 31)] + [{"kind": "validation", "step": 30, "loss": 9.0}]
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert spikes([0.5, 3.0], past=tuple(past_losses(metrics, 20))) == [1]
    assert spikes([0.5, 3.0]) == []  # too little to judge by
