"""Traffic and time of an optimizer step, its arithmetic (`model/flops.py`) added up, and bytes on disk.

A load-balance loss over several micro-batches runs both passes once more, without what scores, to count. Time is
computed with all FLOPs, those of no use included. Bytes on links are what one GPU sends, in rings (all-gather and
reduce-scatter of n ranks: (n - 1)/n of the tensor).
"""

from dataclasses import dataclass

from ds_dgemma.config.run import RunConfig
from ds_dgemma.model.flops import (
    LAYERS,
    VOCABULARY,
    Work,
    example_work,
    forward_flops,
    guess_forward_flops,
    guess_work,
    image_work,
)
from ds_dgemma.plan.activations import FP32
from ds_dgemma.plan.inventory import Inventory, Parameter
from ds_dgemma.plan.setup import Setup, Shape

NORM = "norm"


@dataclass(frozen=True)
class Machine:
    """What a GPU can do; every figure is the user's to say."""

    peak_tflops: float  # of dense matrix products
    utilisation: float  # share of it that the run reaches
    link_gbps: float  # GB/s that one GPU sends to the others
    host_link_gbps: float  # GB/s between one GPU and host memory
    host_memory_gbps: float  # GB/s of host memory per GPU: what an optimizer there is bound by


@dataclass(frozen=True)
class Cost:
    """An optimizer step of one GPU."""

    tokens: int  # of the global batch, all of the longest kind
    useful_flops: float
    flops: float  # with what is computed again, and guesses that count for nothing
    sent: dict[str, int]  # bytes to other GPUs, by collective
    host_traffic: int  # bytes to and from host memory
    host_updates: int  # bytes that an offloaded AdamW reads and writes
    seconds: dict[str, float]

    @property
    def step_seconds(self) -> float:
        """The longest of what overlaps, then what nothing hides."""
        overlapping = max(self.seconds[name] for name in ("arithmetic", "gather and reduce", "host link"))
        return overlapping + self.seconds["all-to-all"] + self.seconds["optimizer in host memory"]


def cost(inventory: Inventory, setup: Setup, shape: Shape, config: RunConfig, machine: Machine) -> Cost:
    """One optimizer step, every example as long as `shape`."""
    counted, empty = setup.guesses(shape, config.objective.self_conditioning_probability)
    work = _work(inventory, setup, shape, counted, empty)
    sent = _sent(inventory, setup, shape, counted + empty)
    host_traffic, host_updates = _host(inventory, setup)
    all_to_all = sent.get("all-to-all", 0)
    rate = machine.link_gbps * 1e9
    return Cost(
        tokens=setup.global_batch_size * shape.tokens,
        useful_flops=work.useful,
        flops=work.useful + work.again,
        sent=sent,
        host_traffic=host_traffic,
        host_updates=host_updates,
        seconds={
            "arithmetic": (work.useful + work.again) / (machine.peak_tflops * 1e12 * machine.utilisation),
            "gather and reduce": (sum(sent.values()) - all_to_all) / rate,
            "all-to-all": all_to_all / rate,
            "host link": host_traffic / (machine.host_link_gbps * 1e9),
            "optimizer in host memory": host_updates / (machine.host_memory_gbps * 1e9),
        },
    )


def _work(inventory: Inventory, setup: Setup, shape: Shape, counted: float, empty: float) -> Work:
    """FLOPs of one GPU's step, with so many first guesses in a micro-batch; their canvases are anywhere among all."""
    products, starts, clean = inventory.products, shape.starts, shape.clean
    example = example_work(products, clean, starts, setup.activation_checkpointing)
    guess = sum((guess_work(products, start) for start in starts), Work(0.0, 0.0)) * (1 / len(starts))
    example += Work(sum(image_work(products, tokens) for tokens in shape.images), 0.0)
    work = example * setup.micro_batch_size + guess * counted + guess.wasted * empty
    if setup.counting_passes:
        guessing = sum(guess_forward_flops(products, start) for start in starts) / len(starts) * (counted + empty)
        forwards = setup.micro_batch_size * forward_flops(products, clean, starts) + guessing
        work += Work(0.0, setup.counting_passes * forwards)
    return work * setup.accumulation


def gathers(inventory: Inventory, setup: Setup) -> dict[str, int]:
    """How often a micro-step needs each unit whole: to read, to denoise, and in the backward pass, which calls a layer
    once and goes back through it at once. The vocabulary is looked up for either and then scores; the last norm follows
    first guesses, and clean tokens and canvases.

    What is used again at once is kept for that, unless stage3_max_reuse_distance is 0: then a layer is gathered for the
    call and for going back, the vocabulary for the losses' gradient, the norm for each of its uses.
    """
    forwards, found = 1 + setup.counting_passes, {}
    for unit, back in inventory.products.goes_back.items():
        found[unit] = 2 * forwards + back + (unit == VOCABULARY)
        if not setup.zero.reuses:
            found[unit] += forwards + 1 if unit == NORM else unit == VOCABULARY or (back and unit.startswith(LAYERS))
    return found


def _sent(inventory: Inventory, setup: Setup, shape: Shape, guesses: float) -> dict[str, int]:
    """Bytes that one GPU sends in a step, by collective."""

    def ring(parameter: Parameter, element: int) -> float:
        n = setup.holders(parameter)
        return element * setup.local(parameter) * (n - 1) / n

    stage, trained = setup.zero.stage, [p for p in inventory.parameters if p.is_trained]
    reduced = sum(ring(p, setup.zero.communication_bytes) for p in trained)
    if stage == 3:
        small = setup.zero.persistence_threshold
        times = gathers(inventory, setup)
        gathered = sum(ring(p, setup.element) * times[p.unit] for p in inventory.parameters if setup.local(p) > small)
        kept_whole = sum(ring(p, setup.element) for p in trained if setup.local(p) <= small)  # after the update
        # Muon gathers gradient and momentum, and then the update and the momentum from the rank that made them.
        muon = 4 * sum(ring(p, setup.zero.communication_bytes) for p in trained if setup.is_muons(p))
        sent = {"all-gather": gathered * setup.accumulation + kept_whole + muon, "reduce": reduced * setup.accumulation}
    else:
        # An all-reduce is a reduce-scatter and an all-gather; stage 1 makes one a step, in fp32.
        sweeps = setup.accumulation if stage == 2 else FP32 / setup.zero.communication_bytes
        sent = {"all-gather": sum(ring(p, setup.element) for p in trained), "reduce": 2 * reduced * sweeps}
    if setup.expert_parallel_size > 1:
        away = (setup.expert_parallel_size - 1) / setup.expert_parallel_size
        row = inventory.text.top_k_experts * inventory.text.hidden_size * setup.element * away
        tokens = setup.micro_batch_size * shape.tokens
        forward = (1 + setup.counting_passes) * (tokens + guesses * shape.canvas_length)
        going_back = [layer.goes_back for layer in inventory.products.layers]
        again = 0 if setup.activation_checkpointing == "none" else sum(going_back[:-1])
        visits = forward * len(going_back) + tokens * (sum(going_back) + again)  # the gradients' way, and once more
        sent["all-to-all"] = 2 * row * visits * setup.accumulation
    return {name: round(size) for name, size in sent.items() if size}


def _host(inventory: Inventory, setup: Setup) -> tuple[int, int]:
    """Bytes of a step between the GPU and host memory, and bytes that an AdamW in host memory touches."""
    zero, moved, touched = setup.zero, 0, 0
    trained = sum(setup.share(p) for p in inventory.parameters if p.is_trained)
    if zero.offload_optimizer:
        # Gradients down, and back and down again for every further micro-batch; new weights up.
        moved += trained * (FP32 * (2 * setup.accumulation) + setup.element)
        touched += trained * (2 * 3 * FP32 + FP32)
    if zero.offload_parameters:
        times = gathers(inventory, setup)
        moved += setup.accumulation * sum(
            setup.element * setup.share(p) * times[p.unit]
            for p in inventory.parameters
            if setup.local(p) > zero.persistence_threshold
        )
    return moved, touched


def bytes_on_disk(inventory: Inventory, setup: Setup, config: RunConfig) -> dict[str, int]:
    """A checkpoint of the training state, all that are kept at once, and what `export` writes unless told otherwise."""
    trained = (p for p in inventory.parameters if p.is_trained)
    state = FP32 * sum((2 if setup.is_muons(p) else 3) * p.numel for p in trained)
    policy, steps = config.checkpoint, config.train.max_steps
    kept = policy.keep_last + policy.keep_best + (steps // policy.keep_every if policy.keep_every else 0)
    written = 1 + (steps // policy.every if policy.every else 0)
    return {
        "a checkpoint": state,
        "kept, and one being written": state * min(kept + 1, written),
        "export": _exported(inventory, config),
    }


def _exported(inventory: Inventory, config: RunConfig) -> int:
    """Bytes of an export with `--dtype auto`. An adapter is PEFT's, fp32, a layer's factors under the encoder's and the
    decoder's name; of a model what a bf16 run trained is bf16, and all else is as it was.
    """
    trained = [p for p in inventory.parameters if p.is_trained]
    if config.lora:
        return sum(FP32 * p.numel * (2 if p.unit.startswith(LAYERS) else 1) for p in trained)
    stored = inventory.stored.itemsize
    changed = 2 if config.train.precision == "bf16" else stored
    return stored * (inventory.total - inventory.trained + inventory.untrained_copy) + changed * inventory.trained
