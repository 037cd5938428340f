"""Bytes of one rank, by kind: what stays on the GPU, what comes and goes, and what lies in host memory.

The peak is what stays, and the largest of the moments of a step. Every figure names an allocation of DeepSpeed 0.19.8
or of this project; `tests/benchmarks/memory.py` holds the states against a real step. Sources: deepspeed
`runtime/zero/stage3.py` (`_create_fp32_partitions`, `_setup_for_real_optimizer`, `_prepare_fp32_grad_for_sub_group`,
`_apply_muon_to_accumulated_grads`), `runtime/zero/stage_1_and_2.py` (`setup_buckets`,
`_build_compact_grad_partition_buffer`), `runtime/zero/partition_parameters.py`, `runtime/zero/muon/original_muon.py`
(`muon_update`); here `model/vocabulary.py`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from ds_dgemma.model.flops import LAYERS, VOCABULARY
from ds_dgemma.model.vision import AT_ONCE
from ds_dgemma.plan.activations import Activations
from ds_dgemma.plan.inventory import Inventory, Parameter
from ds_dgemma.plan.setup import Setup, Shape

GIB = 2**30
FP32 = 4
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
    def worst(self) -> str:
        """The part of a step that needs most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> int:
        """Tensors on the GPU at the worst moment."""
        return sum(self.resident.values()) + sum(self.moments[self.worst].values())

    @property
    def needed(self) -> int:
        """What a GPU must have: the peak, the runtime and the allocator's waste."""
        return int(self.peak * (1 + FRAGMENTATION)) + RUNTIME


def memory(inventory: Inventory, layers: Sequence[Activations], shape: Shape, setup: Setup) -> Memory:
    """Add everything up for one rank; all ranks are alike but for padding."""
    resident, host = _states(inventory, setup)
    moments = {
        "vocabulary": _vocabulary(inventory, layers, shape, setup),
        "a layer, backward": _layer_backward(inventory, layers, shape, setup),
        "optimizer step": {"gradients of a tile": _largest_tile(inventory.trained, setup)},
    }
    while_reducing = resident if setup.stage == 3 else moments["a layer, backward"]
    while_reducing["reduce bucket"] = _reduce_buckets(setup)
    if any(map(setup.is_muons, inventory.trained)):
        moments["Muon"] = _muon(inventory, setup)
    if shape.images:
        tower, micro, H = inventory.products.tower, setup.micro_batch_size, inventory.text.hidden_size
        token = tower.pooled * FP32 * inventory.patch + setup.element * H
        resident |= {"vision tower": setup.element * inventory.outside, "images": micro * sum(shape.images) * token}
        at_once = min(AT_ONCE, micro * len(shape.images))
        moments["vision tower"] = {"a layer of it": at_once * tower.bytes(max(shape.images), setup.element)}
    return Memory({kind: n for kind, n in resident.items() if n}, moments, {kind: n for kind, n in host.items() if n})


def _states(inventory: Inventory, setup: Setup) -> tuple[Bytes, Bytes]:
    """Weights, masters, moments and gradients, on the GPU and in host memory."""
    trained, everything = inventory.trained, inventory.parameters
    shares = sum(map(setup.share, trained))
    weights = setup.element * sum(map(setup.share if setup.stage == 3 else setup.local, everything))
    # Muon's momentum is as gradients are sent
    moments = sum((setup.sent if setup.is_muons(p) else 2 * FP32) * setup.share(p) for p in trained)
    optimizer = {"fp32 master": FP32 * shares, "moments": moments}
    device, host = ({}, {"weights": weights}) if setup.offload_param else ({"weights": weights}, {})
    small = (p for p in everything if setup.comes(p) and setup.is_small(p))
    device["weights kept whole"] = setup.element * _local(small, setup)
    if setup.offload_optimizer:
        host |= optimizer | {"gradients": FP32 * shares, "gradients, for the optimizer": FP32 * shares}
        host["weights, on their way back"] = setup.element * shares if setup.stage < 3 else 0
    else:
        device |= optimizer | {"gradients": FP32 * (_local(trained, setup) if setup.stage == 1 else shares)}
    return device, host


def _local(parameters: Iterable[Parameter], setup: Setup) -> int:
    """Elements that one rank computes with."""
    return sum(map(setup.local, parameters))


def _reduce_buckets(setup: Setup) -> int:
    """The flat buffers that gradients are copied into before they are reduced."""
    if not setup.zero.contiguous_gradients or _is_bf16_optimizer(setup):
        return 0
    if setup.stage == 3:
        return setup.zero.reduce_bucket_size * setup.sent
    return setup.zero.reduce_bucket_size * setup.element * (2 if setup.zero.overlap_comm else 1)


def _is_bf16_optimizer(setup: Setup) -> bool:
    """Stage 1 in bf16 runs on DeepSpeed's BF16_Optimizer: whole fp32 gradients, reduced where they lie."""
    return setup.stage == 1 and setup.element < FP32 and not setup.offload_optimizer


def _gathered(unit: Iterable[Parameter], setup: Setup) -> int:
    """Bytes that come into being when ZeRO-3 gathers a unit."""
    return setup.element * _local((p for p in unit if setup.comes(p) and not setup.is_small(p)), setup)


def _received(rows: int, setup: Setup) -> int:
    """Rows that the busiest rank's experts work on, of `rows` that each rank sends."""
    return int(rows * IMBALANCE) if setup.expert_parallel_size > 1 else rows


def _kept(layer: Activations, rows: int, setup: Setup) -> tuple[int, int]:
    """Bytes of a layer for a micro-batch of so many routed rows: between forward and backward, and what the backward
    pass computes again.
    """
    kept, micro = layer[setup.activation_checkpointing], setup.micro_batch_size
    stored, again = micro * kept.stored, micro * kept.again
    experts = rows * kept.returned + _received(rows, setup) * kept.row
    return (stored, again + experts) if again else (stored + experts, 0)


def _layer_backward(inventory: Inventory, layers: Sequence[Activations], shape: Shape, setup: Setup) -> Bytes:
    tokens, H = setup.micro_batch_size * shape.tokens, inventory.text.hidden_size
    by_unit = groupby(inventory.parameters, key=lambda parameter: parameter.unit)
    units = [list(members) for unit, members in by_unit if unit.startswith(LAYERS)]
    rows = tokens * inventory.text.top_k_experts
    travelling = rows + _received(rows, setup) if setup.expert_parallel_size > 1 else 0
    kept = [_kept(layer, rows, setup) for layer in layers]
    trained = [_local((p for p in unit if p.is_trained), setup) for unit in units]
    # Of the next layer whole tensors are fetched early until the bucket is full.
    most = setup.zero.prefetch_bucket_size + max(setup.local(p) for unit in units for p in unit)
    cast = 1 if setup.sent == setup.element else 2  # interleaved by rank, and before that in another type
    return {
        "activations kept": sum(stored for stored, _ in kept[:-1]),
        "one layer, kept or recomputed": max([kept[-1][0], *(again for _, again in kept[:-1])]),
        "working": tokens * H * FP32 * WORKING_COPIES + rows * H * (FP32 + setup.element),
        "all-to-all": travelling * H * setup.element,
        "gathered layer": max(_gathered(unit, setup) for unit in units),
        "prefetched": max((min(_gathered(unit, setup), setup.element * most) for unit in units[:-1]), default=0),
        "a layer's gradients": setup.element * max(trained),
        "reducing": min(setup.zero.reduce_bucket_size, max(trained)) * setup.sent * cast,
        "vocabulary's fp32 gradient": FP32 * inventory.products.vocabulary * inventory.products.trains_vocabulary,
    }


def _vocabulary(inventory: Inventory, layers: Sequence[Activations], shape: Shape, setup: Setup) -> Bytes:
    """Losses, when all activations are kept; or the end of the backward pass, when the gradient is sent instead."""
    tokens, H = setup.micro_batch_size * shape.tokens, inventory.text.hidden_size
    trained = inventory.products.vocabulary * inventory.products.trains_vocabulary
    kept = sum(_kept(layer, tokens * inventory.text.top_k_experts, setup)[0] for layer in layers)
    cast = trained * setup.sent if setup.sent != setup.element else 0
    return {
        "activations kept, or a gradient on its way": max(kept, cast),
        "hidden states and their gradient": 3 * tokens * H * setup.element,
        # fp32 logits, the soft cap's slope, and the gradient in the weight's type
        "logits chunk": setup.logits_chunk_mib * 2**20 // FP32 * (2 * FP32 + setup.element),
        "gathered vocabulary": _gathered((p for p in inventory.parameters if p.unit == VOCABULARY), setup),
        "vocabulary's fp32 gradient": FP32 * trained,
        "vocabulary's gradient of a chunk": setup.element * trained,
    }


def _muon(inventory: Inventory, setup: Setup) -> Bytes:
    """Matrices made whole, as many as fill a reduce bucket, and the iteration on one of them."""
    matrices = [p for p in inventory.trained if setup.is_muons(p)]
    element = FP32 if setup.offload_optimizer else setup.sent
    largest = max(matrices, key=setup.local)
    whole, (rows, columns) = setup.local(largest), largest.shape[-2:]
    chunk = _local(matrices, setup)
    if not setup.offload_optimizer:
        chunk = max(whole, min(setup.zero.reduce_bucket_size, chunk))
    squares = whole // (rows * columns) * min(rows, columns) ** 2
    return {
        "gradients and momentum, whole and being gathered": element * chunk * (3 if setup.gpus > 1 else 2),
        "a matrix being made orthogonal": element * (2 * whole + 4 * squares),
    }


def _largest_tile(trained: Sequence[Parameter], setup: Setup) -> int:
    """Bytes of the largest flat fp32 copy of gradients that AdamW updates from: ZeRO-3 cuts its groups into tiles of
    whole shares. None where the optimizer reads them where they are.
    """
    if setup.offload_optimizer or _is_bf16_optimizer(setup):
        return 0
    tiles = [0]
    for kind in (False, True):  # experts have groups of their own
        tiles.append(0)
        for share in (setup.share(p) for p in trained if p.is_expert is kind):
            if setup.stage == 3 and tiles[-1] >= setup.zero.sub_group_size:
                tiles.append(0)
            tiles[-1] += share
    return FP32 * max(tiles)
