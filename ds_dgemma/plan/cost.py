"""Arithmetic, traffic and time of an optimizer step, and bytes on disk.

FLOPs are 2 per multiply-add; W are the matrix weights that a token meets in the layers (of experts its top k), P a
layer's visible pairs of query and key, V H the vocabulary's matrix:

    forward of a sweep  = 2 tokens W + sum over layers of 4 P heads head_dim
    first pass          = forward of the guessing rows + 4 V H tokens guessed (logits, soft embedding)
    second pass         = forward + backward + 6 V H tokens scored + 2 V H tokens guessed (the matrix's gradient)
    backward            = 2 tokens W for the activations + 2 tokens W_trained + twice the attention, from the
                          first trained weight on

A load-balance loss over several micro-batches runs both passes once more, without what scores, to count.
With a trained model that is the usual 6 W per token. "Useful" FLOPs leave out what activation checkpointing and the
chunked vocabulary compute again; time is computed with all of them. Bytes on links are what one GPU sends, in rings
(all-gather and reduce-scatter of n ranks: (n - 1)/n of the tensor).
"""

from collections.abc import Callable
from dataclasses import dataclass

from ds_dgemma.config import RunConfig
from ds_dgemma.plan.activations import FP32
from ds_dgemma.plan.inventory import LAYERS, VOCABULARY, Inventory, Parameter
from ds_dgemma.plan.setup import Setup, Shape


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
    flops: float  # with what is computed again
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
    examples = setup.accumulation * setup.micro_batch_size
    probability = config.objective.self_conditioning_probability
    # The first pass runs with one row at least.
    guessing = setup.accumulation * max(1.0, probability * setup.micro_batch_size)
    useful, again = _flops(inventory, setup, shape, examples, guessing)
    sent = _sent(inventory, setup, shape, examples, guessing)
    host_traffic, host_updates = _host(inventory, setup)
    all_to_all = sent.get("all-to-all", 0)
    rate = machine.link_gbps * 1e9
    return Cost(
        tokens=setup.global_batch_size * shape.tokens,
        useful_flops=useful,
        flops=useful + again,
        sent=sent,
        host_traffic=host_traffic,
        host_updates=host_updates,
        seconds={
            "arithmetic": (useful + again) / (machine.peak_tflops * 1e12 * machine.utilisation),
            "gather and reduce": (sum(sent.values()) - all_to_all) / rate,
            "all-to-all": all_to_all / rate,
            "host link": host_traffic / (machine.host_link_gbps * 1e9),
            "optimizer in host memory": host_updates / (machine.host_memory_gbps * 1e9),
        },
    )


def product_weights(inventory: Inventory, shape: Shape, counted: Callable[[Parameter], bool]) -> int:
    """Matrix weights that one example's tokens meet in a sweep, summed over the tokens: layers read all of them, the
    self-conditioning block the canvases.
    """
    text, total = inventory.text, 0
    for p in inventory.parameters:
        if p.is_matrix and p.unit != VOCABULARY and counted(p):
            met = p.numel * text.top_k_experts // text.num_experts if p.is_expert else p.numel
            total += met * (shape.tokens if p.unit.startswith(LAYERS) else shape.canvas)
    return total


def visible_pairs(kind: str, shape: Shape, window: int) -> int:
    """Pairs of query and key that one example's mask lets through, its canvases at the very end."""
    S, start = shape.clean, max(0, shape.clean - shape.canvas_length)
    if kind == "sliding_attention":
        inside = min(S, window)
        causal = inside * (inside + 1) // 2 + (S - inside) * window
        start = min(start, window - 1)
    else:
        causal = S * (S + 1) // 2
    return causal + shape.canvas * (start + shape.canvas_length)


def attention_flops(inventory: Inventory, shape: Shape) -> list[int]:
    """Forward products of each layer's attention for one example."""
    text = inventory.text
    return [
        4
        * visible_pairs(kind, shape, text.sliding_window)
        * text.num_attention_heads
        * text.per_layer_config[i].head_dim
        for i, kind in enumerate(text.layer_types)
    ]


def _flops(inventory: Inventory, setup: Setup, shape: Shape, examples: float, guessing: float) -> tuple[float, float]:
    """Useful FLOPs of one GPU's step, and those of what is computed again."""
    matrix, attention, reached = inventory.vocabulary.numel, attention_flops(inventory, shape), goes_back(inventory)
    forward = 2 * product_weights(inventory, shape, lambda p: True) + sum(attention)
    again_attention = sum(flops for i, flops in enumerate(attention) if reached[f"{LAYERS}{i}"])
    forward_again = 2 * product_weights(inventory, shape, lambda p: reached[p.unit]) + again_attention
    backward = forward_again + again_attention + 2 * product_weights(inventory, shape, lambda p: p.is_trained)
    scored, trained = shape.canvas + shape.clean, inventory.vocabulary.is_trained
    useful = guessing * (forward + 4 * matrix * shape.canvas) + examples * (forward + backward)
    useful += examples * (6 if trained else 4) * matrix * scored
    again = examples * forward_again if setup.activation_checkpointing else 0.0
    again += setup.counting_passes * (guessing * (forward + 4 * matrix * shape.canvas) + examples * forward)
    if trained:
        useful += guessing * 2 * matrix * shape.canvas
        again += guessing * 2 * matrix * shape.canvas  # the guess's logits, for the soft embedding's gradient
    return useful, again


def goes_back(inventory: Inventory) -> dict[str, bool]:
    """Whether the backward pass reaches a unit: it, or something before it, is trained."""
    found, trains = {}, False
    for unit, parameters in inventory.units.items():  # in the order of the forward pass
        trains = trains or any(p.is_trained for p in parameters)
        found[unit] = trains
    return found


def gathers(inventory: Inventory, counting_passes: int) -> dict[str, int]:
    """How often a micro-step needs each unit whole: in both passes, and in the backward pass, which computes it again.
    The vocabulary is looked up in both passes and scores in the second, with a backward pass of its own.
    """
    forwards = 2 * (1 + counting_passes)
    return {unit: forwards + back + (2 if unit == VOCABULARY else 0) for unit, back in goes_back(inventory).items()}


def _sent(inventory: Inventory, setup: Setup, shape: Shape, examples: float, guessing: float) -> dict[str, int]:
    """Bytes that one GPU sends in a step, by collective."""

    def ring(parameter: Parameter, element: int) -> float:
        n = setup.holders(parameter)
        return element * setup.local(parameter) * (n - 1) / n

    stage, trained = setup.zero.stage, [p for p in inventory.parameters if p.is_trained]
    reduced = sum(ring(p, setup.zero.communication_bytes) for p in trained)
    if stage == 3:
        small = setup.zero.persistence_threshold
        times = gathers(inventory, setup.counting_passes)
        gathered = sum(ring(p, setup.element) * times[p.unit] for p in inventory.parameters if setup.local(p) > small)
        kept_whole = sum(ring(p, setup.element) for p in trained if setup.local(p) <= small)  # after the update
        sent = {"all-gather": gathered * setup.accumulation + kept_whole, "reduce": reduced * setup.accumulation}
    else:
        # An all-reduce is a reduce-scatter and an all-gather; stage 1 makes one a step, in fp32.
        sweeps = setup.accumulation if stage == 2 else FP32 / setup.zero.communication_bytes
        sent = {"all-gather": sum(ring(p, setup.element) for p in trained), "reduce": 2 * reduced * sweeps}
    if setup.expert_parallel_size > 1:
        away = (setup.expert_parallel_size - 1) / setup.expert_parallel_size
        row = inventory.text.top_k_experts * inventory.text.hidden_size * setup.element * away
        passes = sum(  # forward, again, and the gradients
            examples * (1 + back * (2 if setup.activation_checkpointing else 1))
            + guessing
            + setup.counting_passes * (examples + guessing)
            for unit, back in goes_back(inventory).items()
            if unit.startswith(LAYERS)
        )
        sent["all-to-all"] = 2 * row * shape.tokens * passes
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
        times = gathers(inventory, setup.counting_passes)
        moved += setup.accumulation * sum(
            setup.element * setup.share(p) * times[p.unit]
            for p in inventory.parameters
            if setup.local(p) > zero.persistence_threshold
        )
    return moved, touched


def bytes_on_disk(inventory: Inventory, config: RunConfig) -> dict[str, int]:
    """A checkpoint of the training state, all that are kept at once, and what `export` writes unless told otherwise."""
    state = 3 * FP32 * inventory.trained
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
