"""Bytes of one rank, by kind: what stays on the GPU, what comes and goes, and what lies in host memory.

The peak is what stays, and the largest of the moments of a step. Every figure names an allocation of DeepSpeed 0.19.8
or of this project; `tests/benchmarks/memory.py` holds the states against a real step. Sources: deepspeed
`runtime/zero/stage3.py` (`_create_fp32_partitions`, `_setup_for_real_optimizer`, `_prepare_fp32_grad_for_sub_group`),
`runtime/zero/stage_1_and_2.py` (`setup_buckets`, `_build_compact_grad_partition_buffer`),
`runtime/zero/partition_parameters.py`; here `model/vocabulary.py`.
"""

from dataclasses import dataclass
from itertools import pairwise

from ds_dgemma.model.flops import LAYERS, VOCABULARY
from ds_dgemma.model.vision import AT_ONCE
from ds_dgemma.plan.activations import FP32, LayerActivations, StackActivations
from ds_dgemma.plan.inventory import Inventory, Parameter
from ds_dgemma.plan.setup import Setup, Shape

GIB = 2**30
# Routed rows that the busiest rank of an expert group receives, to the mean.
IMBALANCE = 1.5
# fp32 tensors of [tokens, hidden] that a layer's backward holds beside what the forward kept.
WORKING_COPIES = 4
# CUDA context, NCCL's and cuBLAS's buffers; and what the caching allocator can't use.
RUNTIME, FRAGMENTATION = 2 * GIB, 0.03

Bytes = dict[str, int]


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    resident: Bytes  # on the GPU, from the first step on
    moments: dict[str, Bytes]  # on the GPU, for a while, by part of a step
    host: Bytes  # in host memory

    @property
    def largest_moment(self) -> str:
        """The part of a step that needs most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> int:
        """Tensors on the GPU at the worst moment."""
        return sum(self.resident.values()) + sum(self.moments[self.largest_moment].values())

    @property
    def needed(self) -> int:
        """What a GPU must have: the peak, the runtime and the allocator's waste."""
        return int(self.peak * (1 + FRAGMENTATION)) + RUNTIME


def memory(inventory: Inventory, activations: StackActivations, setup: Setup, shape: Shape, chunk_mib: int) -> Memory:
    """Add everything up for one rank; all ranks are alike but for padding."""
    resident, host = _states(inventory, setup)
    if shape.images:
        resident |= _images(inventory, setup, shape)
    if setup.zero.stage == 3:
        resident["reduce bucket"] = _reduce_buckets(setup)
    return Memory(
        resident={kind: size for kind, size in resident.items() if size},
        moments={
            "first guess": _first_guess(inventory, activations, setup, shape, chunk_mib),
            "vocabulary, forward": _vocabulary_forward(inventory, activations, setup, shape, chunk_mib),
            "a layer, backward": _layer_backward(inventory, activations, setup, shape),
            "vocabulary, backward": _vocabulary_backward(inventory, setup, shape, chunk_mib),
            "optimizer step": _optimizer_step(inventory, setup),
            **({"Muon": _muon(inventory, setup)} if setup.muon else {}),
            **({"vision tower": _tower(inventory, setup, shape)} if shape.images else {}),
        },
        host={kind: size for kind, size in host.items() if size},
    )


def _images(inventory: Inventory, setup: Setup, shape: Shape) -> Bytes:
    """The tower, whole on every rank, and a micro-batch's images."""
    tower, tokens = inventory.products.tower, setup.micro_batch_size * sum(shape.images)
    return {
        "vision tower": setup.element * inventory.untrained_copy,
        "images": tokens * (tower.pooled * FP32 * inventory.patch + setup.element * inventory.text.hidden_size),
    }


def _tower(inventory: Inventory, setup: Setup, shape: Shape) -> Bytes:
    at_once = min(AT_ONCE, setup.micro_batch_size * len(shape.images))
    return {"a layer of the tower": at_once * inventory.products.tower.bytes(max(shape.images), setup.element)}


def _states(inventory: Inventory, setup: Setup) -> tuple[Bytes, Bytes]:
    """Weights, masters, moments and gradients, on the GPU and in host memory."""
    zero, parameters = setup.zero, inventory.parameters
    trained = [parameter for parameter in parameters if parameter.is_trained]
    shares = sum(map(setup.share, trained))
    held = setup.share if zero.stage == 3 else setup.local
    weights = setup.element * sum(map(held, parameters))
    own = {True: zero.communication_bytes, False: 2 * FP32}  # Muon's momentum is as gradients are sent
    moments = sum(own[setup.is_muons(p)] * setup.share(p) for p in trained)
    optimizer = {"fp32 master": FP32 * shares, "moments": moments}
    gradients = FP32 * (sum(map(setup.local, trained)) if zero.stage == 1 else shares)
    device: Bytes = {"weights": 0 if zero.offload_parameters else weights}
    host: Bytes = {"weights": weights} if zero.offload_parameters else {}
    if zero.stage == 3:
        device["weights kept whole"] = setup.element * sum(map(setup.local, _persistent(inventory, setup)))
    if zero.offload_optimizer:
        host |= optimizer | {"gradients": FP32 * shares, "gradients, for the optimizer": FP32 * shares}
        if zero.stage < 3:
            host["weights, on their way back"] = setup.element * shares
            device["gradients"] = 0
    else:
        device |= optimizer | {"gradients": gradients}
    return device, host


def _persistent(inventory: Inventory, setup: Setup) -> list[Parameter]:
    """Parameters so small that ZeRO-3 keeps them whole beside their shares; none where a share is the whole."""
    zero = setup.zero
    return [
        p
        for p in inventory.parameters
        if setup.local(p) <= zero.persistence_threshold and (setup.holders(p) > 1 or zero.offload_parameters)
    ]


def _reduce_buckets(setup: Setup) -> int:
    """The flat buffers that gradients are copied into before they are reduced; below stage 3 a backward pass's own."""
    zero = setup.zero
    if not zero.contiguous or _is_bf16_optimizer(setup):
        return 0
    if zero.stage == 3:
        return zero.reduce_bucket * zero.communication_bytes
    return zero.reduce_bucket * setup.element * (2 if zero.overlap else 1)


def _is_bf16_optimizer(setup: Setup) -> bool:
    """Stage 1 in bf16 runs on DeepSpeed's BF16_Optimizer: whole fp32 gradients, reduced where they lie."""
    return setup.zero.stage == 1 and setup.element < FP32 and not setup.zero.offload_optimizer


def _buckets_of_a_moment(setup: Setup) -> int:
    return _reduce_buckets(setup) if setup.zero.stage < 3 else 0


def _gathered(unit: tuple[Parameter, ...], setup: Setup) -> int:
    """Bytes that come into being when ZeRO-3 gathers a unit: nothing for what one rank alone holds on the GPU."""
    zero = setup.zero
    if zero.stage < 3:
        return 0
    return setup.element * sum(
        setup.local(p)
        for p in unit
        if setup.local(p) > zero.persistence_threshold and (setup.holders(p) > 1 or zero.offload_parameters)
    )


def _prefetched(unit: tuple[Parameter, ...], setup: Setup) -> int:
    """Bytes of the next unit that are fetched early: whole tensors until the bucket is full."""
    largest = max(map(setup.local, unit))
    return min(_gathered(unit, setup), setup.element * (setup.zero.prefetch_bucket + largest))


def _gradients_of(unit: tuple[Parameter, ...], setup: Setup) -> int:
    """Bytes of a unit's gradients as autograd makes them, whole."""
    return setup.element * sum(setup.local(p) for p in unit if p.is_trained)


def _reducing(elements: int, setup: Setup) -> int:
    """Bytes of the copies while `elements` are reduce-scattered: interleaved by rank, and in another type."""
    zero = setup.zero
    copies = zero.communication_bytes + (0 if zero.communication_bytes == setup.element else zero.communication_bytes)
    return elements * copies


def _layer_units(inventory: Inventory) -> list[tuple[Parameter, ...]]:
    return [unit for name, unit in inventory.units.items() if name.startswith(LAYERS)]


def _experts_kept(layer: LayerActivations, rows: int, setup: Setup) -> int:
    """Bytes that a layer's experts keep for `rows` of an example."""
    routed = setup.micro_batch_size * rows
    return routed * layer.returned + received(routed, setup) * layer.rows


def received(rows: int, setup: Setup) -> int:
    """Rows that the busiest rank's experts work on, of `rows` that each rank sends."""
    return int(rows * IMBALANCE) if setup.expert_parallel_size > 1 else rows


def _keeps_graph(layer: LayerActivations, setup: Setup) -> bool:
    return layer.is_last or setup.activation_checkpointing == "none"


def _stored(layer: LayerActivations, activations: StackActivations, setup: Setup) -> int:
    """Bytes of a layer that are kept between forward and backward."""
    experts = _experts_kept(layer, activations.routed_rows, setup) if _keeps_graph(layer, setup) else 0
    return setup.micro_batch_size * layer.kept[setup.activation_checkpointing].denoised + experts


def _stored_clean(layer: LayerActivations, activations: StackActivations, setup: Setup) -> int:
    """Bytes kept before the canvases: of clean tokens, with the keys and values that canvases are going to see."""
    experts = _experts_kept(layer, activations.read_rows, setup) if _keeps_graph(layer, setup) else 0
    return setup.micro_batch_size * layer.kept[setup.activation_checkpointing].read + experts


def _graph(layer: LayerActivations, activations: StackActivations, setup: Setup) -> int:
    """Bytes of a layer while the backward pass is in it, beside what is stored of all but the last."""
    if layer.is_last:
        return _stored(layer, activations, setup)
    again = setup.micro_batch_size * layer.kept[setup.activation_checkpointing].again
    return again + (0 if _keeps_graph(layer, setup) else _experts_kept(layer, activations.routed_rows, setup))


def _layer_backward(inventory: Inventory, activations: StackActivations, setup: Setup, shape: Shape) -> Bytes:
    units = _layer_units(inventory)
    largest = max(units, key=lambda unit: _gathered(unit, setup) + _gradients_of(unit, setup))
    layer = max(activations.layers, key=lambda layer: _graph(layer, activations, setup))
    routed = setup.micro_batch_size * activations.routed_rows
    travelling = layer.travelling * (routed + received(routed, setup)) if setup.expert_parallel_size > 1 else 0
    H = inventory.text.hidden_size
    in_bucket = min(setup.zero.reduce_bucket, sum(setup.local(p) for p in largest if p.is_trained))
    return {
        "activations kept": sum(_stored(layer, activations, setup) for layer in activations.layers[:-1]),
        "one layer, kept or recomputed": _graph(layer, activations, setup),
        "working": setup.micro_batch_size * shape.tokens * H * FP32 * WORKING_COPIES + routed * layer.combining,
        "all-to-all": travelling,
        "gathered layer": _gathered(largest, setup),
        "prefetched": max((_prefetched(unit, setup) for unit, _ in pairwise(units)), default=0),
        "a layer's gradients": _gradients_of(largest, setup),
        "reduce buckets": _buckets_of_a_moment(setup),
        "reducing": _reducing(in_bucket, setup),
        "vocabulary's fp32 gradient": _vocabulary_gradient(inventory),
    }


def _vocabulary_gradient(inventory: Inventory) -> int:
    """The one buffer that the matrix's three uses add to; none for a frozen matrix."""
    vocabulary = inventory.vocabulary
    return FP32 * vocabulary.numel if vocabulary.is_trained else 0


def _first_guess(
    inventory: Inventory, activations: StackActivations, setup: Setup, shape: Shape, chunk_mib: int
) -> Bytes:
    """Clean tokens are read, canvases not yet: the soft embedding, beside all inputs."""
    tokens = setup.micro_batch_size * (shape.tokens + 2 * shape.canvas)
    return {
        "kept of clean tokens": sum(_stored_clean(layer, activations, setup) for layer in activations.layers),
        "embeddings": tokens * inventory.text.hidden_size * setup.element,
        "logits chunk": _logits_chunk(chunk_mib, setup),
        "gathered vocabulary": _gathered((inventory.vocabulary,), setup),
    }


def _vocabulary_forward(
    inventory: Inventory, activations: StackActivations, setup: Setup, shape: Shape, chunk_mib: int
) -> Bytes:
    vocabulary, tokens = inventory.vocabulary, setup.micro_batch_size * shape.tokens
    return {
        "activations kept": sum(_stored(layer, activations, setup) for layer in activations.layers),
        "hidden states and their gradient": 3 * tokens * inventory.text.hidden_size * setup.element,
        "logits chunk": _logits_chunk(chunk_mib, setup),
        "gathered vocabulary": _gathered((vocabulary,), setup),
        "vocabulary's fp32 gradient": _vocabulary_gradient(inventory),
        "vocabulary's gradient of a chunk": setup.element * vocabulary.numel if vocabulary.is_trained else 0,
    }


def _logits_chunk(chunk_mib: int, setup: Setup) -> int:
    """fp32 logits, the soft cap's slope, and the gradient in the weight's type."""
    return chunk_mib * 2**20 * (2 * FP32 + setup.element) // FP32


def _vocabulary_backward(inventory: Inventory, setup: Setup, shape: Shape, chunk_mib: int) -> Bytes:
    unit = inventory.units[VOCABULARY]
    gradients = _gradients_of(unit, setup)
    cast = setup.zero.communication_bytes != setup.element
    return {
        "hidden states and their gradient": (
            3 * setup.micro_batch_size * shape.tokens * inventory.text.hidden_size * setup.element
        ),
        "logits chunk": _logits_chunk(chunk_mib, setup),
        "gathered vocabulary": _gathered(unit, setup),
        "vocabulary's fp32 gradient": _vocabulary_gradient(inventory),
        "vocabulary's gradient": gradients,
        "reduce buckets": _buckets_of_a_moment(setup),
        "reducing": gradients // setup.element * setup.zero.communication_bytes if cast else 0,
    }


def _optimizer_step(inventory: Inventory, setup: Setup) -> Bytes:
    """One flat fp32 copy of a tile's gradients; nothing where the optimizer reads them where they are."""
    if setup.zero.offload_optimizer or _is_bf16_optimizer(setup):
        return {"gradients of a tile": 0}
    trained = [p for p in inventory.parameters if p.is_trained]
    return {"gradients of a tile": FP32 * largest_tile(trained, setup)}


def _muon(inventory: Inventory, setup: Setup) -> Bytes:
    """Matrices made whole, as many as fill a reduce bucket, and the iteration on one of them.

    (deepspeed 0.19.8 `stage3.py`, `_apply_muon_to_accumulated_grads`; `muon/original_muon.py`, `muon_update`.)
    """
    matrices = [p for p in inventory.parameters if p.is_trained and setup.is_muons(p)]
    if not matrices:  # all are frozen
        return {}
    element = FP32 if setup.zero.offload_optimizer else setup.zero.communication_bytes
    largest = max(matrices, key=setup.local)
    whole, (rows, columns) = setup.local(largest), largest.shape[-2:]
    chunk = sum(map(setup.local, matrices)) if setup.zero.offload_optimizer else setup.zero.reduce_bucket
    gathered = max(whole, min(chunk, sum(map(setup.local, matrices))))
    squares = whole // (rows * columns) * min(rows, columns) ** 2
    return {
        "gradients and momentum, whole": 2 * element * gathered,
        "being gathered": element * gathered if setup.gpus > 1 else 0,
        "a matrix being made orthogonal": element * (2 * whole + 4 * squares),
    }


def largest_tile(trained: list[Parameter], setup: Setup) -> int:
    """Elements of the largest piece that AdamW updates at once: ZeRO-3 cuts its groups into tiles of whole shares."""
    largest = 0
    for kind in (False, True):  # experts have groups of their own
        tile = 0
        for parameter in (p for p in trained if p.is_expert is kind):
            tile += setup.share(parameter)
            largest = max(largest, tile)
            if setup.zero.stage == 3 and tile >= setup.zero.sub_group:
                tile = 0
    return largest
