"""Arithmetic and traffic of an optimizer step, and bytes of a checkpoint. The arithmetic is `model/flops.py`'s.

Bytes on links are what one GPU sends, in rings (all-gather and reduce-scatter of n ranks: (n - 1)/n of the tensor).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ds_dgemma.model import flops
from ds_dgemma.plan.inventory import Inventory, Parameter
from ds_dgemma.plan.memory import FP32
from ds_dgemma.plan.setup import Setup, Shape


@dataclass(frozen=True)
class Cost:
    """An optimizer step of one GPU."""

    useful_flops: float
    flops: float  # with what is computed again, and guesses that count for nothing
    sent: dict[str, int]  # bytes to other GPUs, by collective, and to and from host memory
    checkpoint: int  # bytes on disk


def cost(inventory: Inventory, shape: Shape, setup: Setup, self_conditioning: float) -> Cost:
    """One optimizer step, every example as long as `shape`, `self_conditioning` the share of canvases with a guess."""
    canvases = setup.micro_batch_size * shape.canvases
    # First guesses of a micro-batch, as many as are expected: those of a coin, and one to stay in step without any.
    counted, empty = self_conditioning * canvases, (1 - self_conditioning) ** canvases
    work = _work(inventory, shape, setup, counted, empty)
    sent = _of_zero(inventory, setup)
    sent["all-to-all"] = _all_to_all(inventory, shape, setup, counted + empty)
    sent["host memory, both ways"] = _host(inventory, setup)
    return Cost(
        useful_flops=work.useful,
        flops=work.useful + work.again,
        sent={name: round(size) for name, size in sent.items() if size},
        checkpoint=FP32 * sum((2 if setup.is_muons(p) else 3) * p.numel for p in inventory.trained),
    )


def _work(inventory: Inventory, shape: Shape, setup: Setup, counted: float, empty: float) -> flops.Work:
    """FLOPs of one GPU's step, with so many first guesses in a micro-batch; their canvases are anywhere among all."""
    products, starts, micro = inventory.products, shape.starts, setup.micro_batch_size
    example = flops.example_work(products, shape.clean, starts, setup.activation_checkpointing)
    example += flops.Work(sum(flops.image_work(products, tokens) for tokens in shape.images), 0.0)
    guess = sum((flops.guess_work(products, start) for start in starts), flops.Work(0.0, 0.0)) * (1 / len(starts))
    guessing = sum(flops.guess_forward_flops(products, start) for start in starts) / len(starts) * (counted + empty)
    counting = (setup.forwards - 1) * (micro * flops.forward_flops(products, shape.clean, starts) + guessing)
    return (example * micro + guess * counted + guess.wasted * empty + flops.Work(0.0, counting)) * setup.accumulation


def gathers(inventory: Inventory, setup: Setup) -> dict[str, int]:
    """How often a micro-step needs each unit whole: to read, to denoise, and in the backward pass. The vocabulary is
    looked up for either and then scores; the last norm follows first guesses, and clean tokens and canvases. What is
    used again at once is kept for that, unless stage3_max_reuse_distance is 0: then the vocabulary is gathered for the
    losses' gradient too, the norm for each of its uses.
    """
    found = {}
    for unit, back in inventory.products.goes_back.items():
        found[unit] = 2 * setup.forwards + back + (unit == flops.VOCABULARY)
        if not setup.zero.max_reuse_distance:
            found[unit] += setup.forwards + 1 if unit == "norm" else unit == flops.VOCABULARY
    return found


def _ring(parameters: Iterable[Parameter], setup: Setup) -> float:
    """Elements that one GPU sends to gather parameters or to reduce their gradients."""
    return sum(setup.local(p) * (1 - 1 / setup.holders(p)) for p in parameters)


def _of_zero(inventory: Inventory, setup: Setup) -> dict[str, float]:
    """Bytes of parameters, at stage 3 at every use, small ones and else once after the update; and of gradients."""
    trained, times = inventory.trained, gathers(inventory, setup)
    ring = _ring(trained, setup)
    if setup.stage < 3:
        # An all-reduce is a reduce-scatter and an all-gather; stage 1 makes one a step, in fp32.
        reduced = setup.sent * setup.accumulation if setup.stage == 2 else FP32
        return {"all-gather": setup.element * ring, "reduce": 2 * reduced * ring}
    gathered = sum(_ring([p], setup) * times[p.unit] for p in inventory.parameters if not setup.is_small(p))
    kept_whole = _ring((p for p in trained if setup.is_small(p)), setup)
    # Muon gathers gradient and momentum, and then the update and the momentum from the rank that made them.
    muon = 4 * setup.sent * _ring((p for p in trained if setup.is_muons(p)), setup)
    return {
        "all-gather": setup.element * (gathered * setup.accumulation + kept_whole) + muon,
        "reduce": setup.sent * ring * setup.accumulation,
    }


def _all_to_all(inventory: Inventory, shape: Shape, setup: Setup, guesses: float) -> float:
    """Bytes of tokens to the ranks of their experts and back, in every visit of a layer."""
    away = 1 - 1 / setup.expert_parallel_size
    row = inventory.text.top_k_experts * inventory.text.hidden_size * setup.element * away
    tokens = setup.micro_batch_size * shape.tokens
    going_back = [layer.goes_back for layer in inventory.products.layers]
    again = 0 if setup.activation_checkpointing == "none" else sum(going_back[:-1])
    forward = setup.forwards * (tokens + guesses * shape.canvas_length) * len(going_back)
    visits = forward + tokens * (sum(going_back) + again)  # the gradients' way, and once more
    return 2 * row * visits * setup.accumulation


def _host(inventory: Inventory, setup: Setup) -> int:
    """Bytes between the GPU and host memory."""
    moved, times = 0, gathers(inventory, setup)
    if setup.offload_optimizer:
        # Gradients down, and back and down again for every further micro-batch; new weights up.
        moved += sum(map(setup.share, inventory.trained)) * (FP32 * 2 * setup.accumulation + setup.element)
    if setup.offload_param:
        coming = (p for p in inventory.parameters if not setup.is_small(p))
        moved += setup.element * setup.accumulation * sum(setup.share(p) * times[p.unit] for p in coming)
    return moved
