"""Losses that jump out of their recent range: told, never acted upon."""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from ds_dgemma.config.run import HealthSection
from ds_dgemma.tracking.metrics import Record, read_lines

LEAST_LOSSES = 20  # before that a median says little
NORMAL = 1.4826  # median absolute deviation -> standard deviation, where losses are normal
LEAST_DEVIATION = 0.01  # of the median: a flat curve is no measure


class SpikeDetector:
    """Holds each loss against the median and the median absolute deviation of those before it."""

    def __init__(self, health: HealthSection, past: Iterable[float] = ()) -> None:
        self._factor = health.spike_factor
        self._recent: deque[float] = deque((loss for loss in past if math.isfinite(loss)), health.spike_window)

    def look(self, step: int, loss: float) -> Record | None:
        """A record of kind `spike` when this loss is one; it counts among the recent ones from now on."""
        if not self._factor or not math.isfinite(loss):
            return None
        recent = list(self._recent)
        self._recent.append(loss)
        if len(recent) < LEAST_LOSSES:
            return None
        median = statistics.median(recent)
        spread = NORMAL * statistics.median(abs(one - median) for one in recent)
        deviations = (loss - median) / max(spread, LEAST_DEVIATION * abs(median), math.ulp(1.0))
        if deviations <= self._factor:
            return None
        return {"kind": "spike", "step": step, "loss": loss, "median": median, "deviations": deviations}


def past_losses(metrics: Path, count: int) -> list[float]:
    """The last losses of a run that goes on."""
    if not metrics.is_file():
        return []
    return [float(record["loss"]) for _, record in deque(_steps(metrics), count)]


def _steps(metrics: Path) -> Iterable[tuple[str, Record]]:
    return ((line, record) for line, record in read_lines(metrics) if "kind" not in record)
