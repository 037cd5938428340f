"""From a run config to what it needs, whether that fits, and the nearest way to run it that does.

Nothing of the model but its config.json is read, and no GPU is asked.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import inf, isqrt
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, DiffusionGemmaConfig

from ds_dgemma.config.run import RunConfig
from ds_dgemma.engine.ds_config import deepspeed_config, read_json
from ds_dgemma.engine.trainable import all_names, check_groups, check_router_balance, check_stage, trained_names
from ds_dgemma.errors import UserError
from ds_dgemma.model.spec import read_spec, text_spec
from ds_dgemma.model.stack import DiffusionGemmaStack
from ds_dgemma.model.sweep import Checkpointing
from ds_dgemma.plan.activations import StackActivations, trace
from ds_dgemma.plan.cost import Cost, Machine, bytes_on_disk, cost
from ds_dgemma.plan.inventory import Inventory, build_stack_for, take_inventory
from ds_dgemma.plan.memory import GIB, Memory, memory
from ds_dgemma.plan.setup import Setup, Shape, Zero, read_setup, read_shape, read_zero

RELEASED = "google/diffusiongemma-26B-A4B-it"
RELEASED_SHAPES = Path(__file__).with_name("released_26b.json")
ZERO3 = Path(__file__).parents[2] / "ds_configs" / "zero3.json"  # what a change of stage is advised as
MOST_GPUS = 64
SPARING: list[Checkpointing] = ["none", "selective", "full"]
SMALL_CHUNK = 64  # MiB of logits: less would not help, and slow a run down


@dataclass(frozen=True)
class Limits:
    """What there is; None: not known, so not judged."""

    gpu_memory: float  # GiB
    host_memory: float | None  # GiB of a node
    gpus_per_node: int


@dataclass(frozen=True)
class Plan:
    """A run config on a number of GPUs."""

    source: str  # where the model's shapes are from
    inventory: Inventory
    setup: Setup
    shape: Shape
    limits: Limits
    memory: Memory
    cost: Cost
    disk: dict[str, int]
    problems: tuple[str, ...]  # why it does not fit; empty: it fits
    nearest: tuple[tuple[str, ...], Setup, Memory] | None  # what to change, when it does not
    advice: str  # what else could help, when nothing near fits


@dataclass(frozen=True)
class _Subject:
    """What stays the same while setups are compared."""

    inventory: Inventory
    activations: StackActivations
    shape: Shape
    limits: Limits
    chunk_mib: int

    def memory(self, setup: Setup) -> Memory:
        return memory(self.inventory, self.activations, setup, self.shape, self.chunk_mib)


def make_plan(
    config: RunConfig, gpus: int, limits: Limits, machine: Machine, length: int | None = None, images: int = 0
) -> Plan:
    """Plan `config` on `gpus` GPUs, for examples of `length` clean tokens (None: the longest that it allows), with
    so many images each.

    Raises:
        UserError: what training would refuse before it loads the model.
    """
    settings = deepspeed_config(config, gpus, "cuda")
    spec, source = read_shapes(config)
    _check_experts(config, spec)
    stack = build_stack_for(config, spec)
    inventory, setup = take_inventory(stack), read_setup(config, settings, gpus)
    check_stage(setup.zero.stage, trained_names(stack))
    check_groups(config.optimizer, trained_names(stack), [*all_names(stack), *inventory.outside])
    check_router_balance(config.objective.router_balance_weight, trained_names(stack))
    shape = read_shape(config, inventory, length, images)
    activations = trace(stack, shape, setup.dtype)
    subject = _Subject(inventory, activations, shape, limits, config.objective.logits_chunk_mib)
    needed = subject.memory(setup)
    problems = _problems(needed, setup, limits)
    nearest = _nearest(subject, setup) if problems else None
    return Plan(
        source=source,
        inventory=inventory,
        setup=setup,
        shape=shape,
        limits=limits,
        memory=needed,
        cost=cost(inventory, setup, shape, config, machine),
        disk=bytes_on_disk(inventory, setup, config),
        problems=problems,
        nearest=nearest,
        advice=_advice(subject, stack, setup) if problems and nearest is None else "",
    )


def read_shapes(config: RunConfig) -> tuple[DiffusionGemmaConfig, str]:
    """The model's config and where it is from; the released model's needs neither network nor download."""
    path, revision = config.model.path, config.model.revision
    cached = try_to_load_from_cache(path, "config.json", revision=revision) if path == RELEASED else None
    if path == RELEASED and not isinstance(cached, str):
        spec = AutoConfig.from_pretrained(RELEASED_SHAPES)
        assert isinstance(spec, DiffusionGemmaConfig)
        return spec, f"the shape table of {RELEASED} that comes with ds_dgemma"
    return read_spec(path, revision), path


def _check_experts(config: RunConfig, spec: DiffusionGemmaConfig) -> None:
    experts, size = text_spec(spec).num_experts, config.parallel.expert_parallel_size
    if experts % size:
        fitting = ", ".join(map(str, _divisors(experts)))
        raise UserError(
            f"parallel.expert_parallel_size = {size} does not divide the model's {experts} experts. Set {fitting}."
        )


def host_bytes(needed: Memory, setup: Setup, limits: Limits) -> int:
    """Host memory of a node's ranks together."""
    return sum(needed.host.values()) * min(setup.gpus, limits.gpus_per_node)


def _problems(needed: Memory, setup: Setup, limits: Limits) -> tuple[str, ...]:
    found, host = [], host_bytes(needed, setup, limits)
    if needed.needed > limits.gpu_memory * GIB:
        found.append(f"a GPU needs {needed.needed / GIB:.1f} GiB of {limits.gpu_memory:g}")
    if limits.host_memory is not None and host > limits.host_memory * GIB:
        found.append(f"a node needs {host / GIB:.1f} GiB of host memory of {limits.host_memory:g}")
    return tuple(found)


def _nearest(subject: _Subject, setup: Setup) -> tuple[tuple[str, ...], Setup, Memory] | None:
    """The setup that fits and changes least: free changes before slow ones, slow ones before more GPUs."""
    best, least = None, inf
    for changes, effort, candidate in _variants(subject, setup):
        if effort >= least:
            continue
        needed = subject.memory(candidate)
        if not _problems(needed, candidate, subject.limits):
            best, least = (changes, candidate, needed), effort
    return best


def _advice(subject: _Subject, stack: DiffusionGemmaStack, setup: Setup) -> str:
    """What of the config is to blame where no setup near fits; the GPU's size when nothing of it is."""
    shape = Shape(subject.shape.canvas_length, 1, subject.shape.canvas_length)
    shortest = {"shape": shape, "activations": trace(stack, shape, setup.dtype)}
    small_chunk = {"chunk_mib": min(SMALL_CHUNK, subject.chunk_mib)}
    length, chunk = (
        f"data.max_length below {subject.shape.clean}",
        f"objective.logits_chunk_mib below {subject.chunk_mib}",
    )
    for advice, smaller in (
        (chunk, small_chunk),
        (length, shortest),
        (f"{length} and {chunk}", shortest | small_chunk),
    ):
        if _nearest(replace(subject, **smaller), setup):
            return f"set {advice}"
    return "take GPUs of more memory"


def _variants(subject: _Subject, setup: Setup) -> Iterator[tuple[tuple[str, ...], float, Setup]]:
    """Every other way to run the same science, what it changes, and how much one would mind."""
    zero, experts, rows = setup.zero, subject.inventory.text.num_experts, setup.global_batch_size
    for gpus, ep, base, optimizer, parameters, checkpointing, micro in product(
        [setup.gpus * 2**n for n in range(7) if setup.gpus * 2**n <= max(MOST_GPUS, setup.gpus)],
        _divisors(experts),
        _jsons(setup),
        sorted({zero.offload_optimizer, True}),
        sorted({zero.offload_parameters, True}),
        SPARING[SPARING.index(setup.activation_checkpointing) :],
        [n for n in _divisors(rows) if n <= setup.micro_batch_size],
    ):
        if gpus % ep or rows % (gpus * micro) or (parameters and base.stage < 3):
            continue
        candidate = replace(
            setup,
            gpus=gpus,
            expert_parallel_size=ep,
            micro_batch_size=micro,
            activation_checkpointing=checkpointing,
            zero=replace(base, offload_optimizer=optimizer, offload_parameters=parameters),
        )
        changes = _changes(setup, candidate)
        yield tuple(text for text, _ in changes), sum(effort for _, effort in changes), candidate


def _jsons(setup: Setup) -> list[Zero]:
    """The run's own DeepSpeed JSON, and where it is of a lower stage, the ready one of stage 3 with its own buckets."""
    if setup.zero.stage == 3 or not ZERO3.is_file():  # a package installed without the repository has no JSON
        return [setup.zero]
    return [setup.zero, read_zero(read_json(ZERO3), setup.dtype)]


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _changes(before: Setup, after: Setup) -> list[tuple[str, float]]:
    """What differs, in the user's own settings, and how much one would mind: speed lost, machines to be had."""
    old, new = before.zero, after.zero
    restaged = old.stage != new.stage  # by another JSON, which offloads nothing yet
    on_cpu = '"{}": {{"device": "cpu"}} in the JSON\'s zero_optimization'
    possible = [
        (
            f"train.micro_batch_size: {after.micro_batch_size}",
            before.micro_batch_size != after.micro_batch_size,
            before.micro_batch_size / after.micro_batch_size,
        ),
        (
            f"train.activation_checkpointing: {after.activation_checkpointing}",
            before.activation_checkpointing != after.activation_checkpointing,
            1 + SPARING.index(after.activation_checkpointing) / 7,
        ),
        (
            f"parallel.expert_parallel_size: {after.expert_parallel_size}",
            before.expert_parallel_size != after.expert_parallel_size,
            1 + after.expert_parallel_size / 1000,
        ),
        ("deepspeed: ds_configs/zero3.json", restaged, 2),
        (
            on_cpu.format("offload_optimizer"),
            new.offload_optimizer and (restaged or not old.offload_optimizer),
            0 if old.offload_optimizer else 20,
        ),
        (on_cpu.format("offload_param"), old.offload_parameters != new.offload_parameters, 40),
        (f"{after.gpus} GPUs", before.gpus != after.gpus, 100 * after.gpus / before.gpus),
    ]
    return [(text, effort) for text, differs, effort in possible if differs]
