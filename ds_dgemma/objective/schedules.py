"""How noise levels are spread: a schedule maps an even draw u in [0, 1) to a share in [0, 1], rising with u, and the
level is as far between `objective.noise_eps` and `objective.noise_max`.

So with every schedule a canvas with a larger u has more noise. A new one is a function here, its name in SCHEDULES and
in `config/run.py` (NoiseSchedule), and a test.

Sources: uniform, DiffusionGemma's, gemma/diffusion `hackable_diffusion_adapter/hd/sft_model.py`; cosine, the share of
masked tokens in MaskGIT, cos(pi / 2 * r) of an even r (arXiv 2202.04200, section 3.2); logit_normal, the time steps of
Stable Diffusion 3, m = 0 and s = 1 (arXiv 2403.03206, section 3.1).
"""

import math
from collections.abc import Callable
from statistics import NormalDist

from ds_dgemma.config.run import NoiseSchedule


def noise_level(schedule: NoiseSchedule, u: float, eps: float, most: float) -> float:
    """The level t in [eps, most] of a draw u in [0, 1)."""
    return min(most, eps + (most - eps) * SCHEDULES[schedule](u))


def uniform(u: float) -> float:
    """All levels alike."""
    return u


def cosine(u: float) -> float:
    """More of the high levels: density 2 / (pi * sqrt(1 - t^2)), half of the canvases above 0.71."""
    return math.sin(math.pi / 2 * u)  # cos(pi / 2 * r) of r = 1 - u


def logit_normal(u: float) -> float:
    """More of the middle: log(t / (1 - t)) is standard normal, half of the canvases between 0.34 and 0.66."""
    return 1 / (1 + math.exp(-NormalDist().inv_cdf(u))) if u > 0 else 0.0


SCHEDULES: dict[NoiseSchedule, Callable[[float], float]] = {
    "uniform": uniform,
    "cosine": cosine,
    "logit_normal": logit_normal,
}
