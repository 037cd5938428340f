"""The learning rate as a function of the step alone, so that a resumed run needs no scheduler state."""

import math

from ds_dgemma.config.optimizer import OptimizerSection


def learning_rate(step: int, max_steps: int, optimizer: OptimizerSection) -> float:
    """Learning rate of update `step` (from 0): linear warm-up to lr, then a cosine that reaches min_lr at the last
    step.
    """
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    progress = (step - optimizer.warmup_steps) / max(1, max_steps - 1 - optimizer.warmup_steps)
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
