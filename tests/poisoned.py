"""Train, or replay a step, where some examples make numbers go bad.

    python -m tests.poisoned loss|gradient|experts IDS train|replay ARGUMENTS...
    python -m tests.poisoned omit STEP train ARGUMENTS...

IDS: example ids with commas between them, or `all`. loss: their loss is NaN, and so is all that follows from it.
gradient: the loss is right, a gradient behind it is NaN. experts: no more than one number of the gradient of one
layer's experts is infinite, and only on the rank that has the example. Being a matter of the example, it happens
again wherever that is computed. omit: all is right, but nothing is computed at STEP, as if training were without
it.
"""

import os
import sys
from typing import Any

import torch
from torch import Tensor

from ds_dgemma.data.batch import Batch
from ds_dgemma.objective.denoising import DenoisingObjective, LossParts
from ds_dgemma.run.step import Update
from ds_dgemma.tracking.metrics import StepMetrics


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * float("nan")


def poison(kind: str, ids: str) -> None:
    """Patch the objective, in this process, for the rest of its life."""
    chosen = None if ids == "all" else {int(name) for name in ids.split(",")}
    right = DenoisingObjective.forward
    hooked: list[Tensor] = []
    spoiling: list[bool] = []  # not empty: the experts' next gradients are to be spoilt

    def forward(self: DenoisingObjective, batch: Batch, *rest: Any) -> LossParts:
        parts = right(self, batch, *rest)
        if not self.training or (chosen is not None and not chosen & set(batch.sample_ids)):
            return parts
        if kind == "loss":
            return parts._replace(loss=parts.loss * float("nan"), diffusion_nll=parts.diffusion_nll * float("nan"))
        if kind == "gradient":
            return parts._replace(loss=_NanGradient.apply(parts.loss))
        spoiling.append(True)
        experts = next(p for name, p in self.named_parameters() if ".experts." in name and p.requires_grad)
        if not hooked:
            experts.register_hook(spoil)
            hooked.append(experts)
        return parts

    def spoil(gradient: Tensor) -> Tensor:
        if not spoiling:
            return gradient
        spoiling.clear()
        gradient = gradient.clone()
        gradient.view(-1)[-1] = float("inf")
        return gradient

    DenoisingObjective.forward = forward  # pyright: ignore[reportAttributeAccessIssue]


def omit(step: int) -> None:
    """Leave a step out of training, in this process: its batch is drawn, and that is all."""
    from ds_dgemma import train

    right = train.update

    def update(engine: Any, batches: Any, at: int, *rest: Any) -> Update:
        if at != step:
            return right(engine, batches, at, *rest)
        next(batches)
        nothing = StepMetrics(
            step=at,
            loss=0.0,
            loss_diffusion=0.0,
            loss_ar=0.0,
            grad_norm=0.0,
            lr=0.0,
            samples=0,
            tokens=0,
            seconds=0.0,
            tokens_per_second=0.0,
            memory_gib=0.0,
        )
        return Update(nothing, False, [], [])

    train.update = update


def main() -> int:
    kind, ids, program, *arguments = sys.argv[1:]
    omit(int(ids)) if kind == "omit" else poison(kind, ids)
    if program == "train":
        from ds_dgemma.train import main as train

        return train(arguments)
    from ds_dgemma.cli import main as command

    return command([program, *arguments])


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as `ds_dgemma.train` does
