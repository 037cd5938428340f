"""From a run config to what it needs, whether that fits, and a way to run it that does.

Nothing of the model but its config.json is read, and no GPU is asked.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import gcd
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, DiffusionGemmaConfig

from ds_dgemma.config.division import check_experts, divisors
from ds_dgemma.config.run import RunConfig
from ds_dgemma.engine.ds_config import DTYPES, deepspeed_config
from ds_dgemma.model.spec import read_spec, text_spec
from ds_dgemma.model.trainable import all_names, check_trained, trained_names
from ds_dgemma.plan.activations import trace
from ds_dgemma.plan.cost import Cost, cost
from ds_dgemma.plan.inventory import Inventory, build_stack_for, take_inventory
from ds_dgemma.plan.memory import GIB, Memory, memory
from ds_dgemma.plan.setup import Setup, Shape, read_setup, read_shape

RELEASED = "google/diffusiongemma-26B-A4B-it"
RELEASED_SHAPES = Path(__file__).with_name("released_26b.json")
MOST_GPUS = 64
SMALL_CHUNK = 64  # MiB of logits: less would not help, and slow a run down
ON_CPU = '"{}": {{"device": "cpu"}} in the JSON\'s zero_optimization'

Change = tuple[str, dict[str, Any]]  # in the user's own settings, and in fields of a setup


@dataclass(frozen=True)
class Limits:
    """What there is; None: not known, so not judged."""

    gpu_memory: float  # GiB
    host_memory: float | None  # GiB of a node
    gpus_per_node: int


@dataclass(frozen=True)
class Way:
    """One way to run a config."""

    changes: list[str]  # what to set for it
    setup: Setup
    memory: Memory
    node_bytes: int  # host memory of a node's ranks together
    problems: list[str]  # why it does not fit; empty: it fits


@dataclass(frozen=True)
class Plan(Way):
    """A run config as it is, on a number of GPUs."""

    source: str  # where the model's shapes are from
    inventory: Inventory
    shape: Shape
    limits: Limits
    cost: Cost
    nearest: Way | None  # what would fit, when it does not


def make_plan(config: RunConfig, gpus: int, limits: Limits, length: int | None = None, images: int = 0) -> Plan:
    """Plan `config` on `gpus` GPUs, for examples of `length` clean tokens (None: the longest that it allows), with
    so many images each.

    Raises:
        UserError: what training would refuse before it loads the model.
    """
    settings = deepspeed_config(config, gpus, "cuda")
    spec, source = read_shapes(config)
    check_experts(text_spec(spec).num_experts, config.parallel.expert_parallel_size, gpus)
    stack = build_stack_for(config, spec)
    inventory, setup = take_inventory(stack), read_setup(config, settings, gpus)
    check_trained(config, setup.stage, trained_names(stack), all_names(stack))
    shape = read_shape(config, inventory.products.canvas_length, length, images)
    activations = trace(stack, shape, DTYPES[config.train.precision])
    judge = partial(_judge, setup, limits, partial(memory, inventory, activations, shape))
    way = judge([])
    changes = _changes(setup, inventory.text.num_experts, limits.gpus_per_node) if way.problems else ()
    return Plan(
        **vars(way),
        source=source,
        inventory=inventory,
        shape=shape,
        limits=limits,
        cost=cost(inventory, shape, setup, config.objective.self_conditioning_probability),
        nearest=_nearest(changes, judge),
    )


def _judge(setup: Setup, limits: Limits, needs: Callable[[Setup], Memory], changes: Sequence[Change]) -> Way:
    """What a setup with changes made to it needs, and why it cannot be."""
    for _, fields in changes:
        setup = replace(setup, **fields)
    needed, problems = needs(setup), []
    node_bytes = sum(needed.host.values()) * min(setup.gpus, limits.gpus_per_node)
    if setup.global_batch_size % (setup.micro_batch_size * setup.gpus):
        problems.append("the batch does not divide")
    if needed.needed > limits.gpu_memory * GIB:
        problems.append(f"a GPU needs {needed.needed / GIB:.1f} GiB of {limits.gpu_memory:g}")
    if limits.host_memory is not None and node_bytes > limits.host_memory * GIB:
        problems.append(f"a node needs {node_bytes / GIB:.1f} GiB of host memory of {limits.host_memory:g}")
    return Way([text for text, _ in changes], setup, needed, node_bytes, problems)


def read_shapes(config: RunConfig) -> tuple[DiffusionGemmaConfig, str]:
    """The model's config and where it is from; the released model's needs neither network nor download."""
    path, revision = config.model.path, config.model.revision
    cached = try_to_load_from_cache(path, "config.json", revision=revision) if path == RELEASED else None
    if path == RELEASED and not isinstance(cached, str):
        spec = AutoConfig.from_pretrained(RELEASED_SHAPES)
        assert isinstance(spec, DiffusionGemmaConfig)
        return spec, f"the shape table of {RELEASED} that comes with ds_dgemma"
    return read_spec(path, revision), path


def _changes(setup: Setup, experts: int, gpus_per_node: int) -> Iterator[Change]:
    """What can be changed of a run without changing its science, what costs least first."""
    if setup.logits_chunk_mib > SMALL_CHUNK:
        yield f"objective.logits_chunk_mib: {SMALL_CHUNK}", {"logits_chunk_mib": SMALL_CHUNK}
    for micro in reversed(divisors(setup.micro_batch_size)[:-1]):
        yield f"train.micro_batch_size: {micro}", {"micro_batch_size": micro}
    for how in {"none": ("selective", "full"), "selective": ("full",)}.get(setup.activation_checkpointing, ()):
        yield f"train.activation_checkpointing: {how}", {"activation_checkpointing": how}
    group = gcd(experts, setup.gpus, gpus_per_node)
    if group > setup.expert_parallel_size:
        yield f"parallel.expert_parallel_size: {group}", {"expert_parallel_size": group}
    if setup.stage < 3:
        yield '"stage": 3 in the JSON\'s zero_optimization', {"stage": 3}
    if not setup.offload_optimizer:
        yield ON_CPU.format("offload_optimizer"), {"offload_optimizer": True}
    if not setup.offload_param and setup.stage == 3:
        yield ON_CPU.format("offload_param"), {"offload_param": True}
    for gpus in (setup.gpus * 2**n for n in range(1, 7) if setup.gpus * 2**n <= MOST_GPUS):
        yield f"{gpus} GPUs", {"gpus": gpus}


def _nearest(changes: Iterable[Change], judge: Callable[[Sequence[Change]], Way]) -> Way | None:
    """Make one change after the other until it fits; then leave out what was not needed, what costs most first."""
    made: list[Change] = []
    for change in changes:
        made.append(change)
        if not judge(made).problems:
            for unneeded in reversed(made[:-1]):
                without = [other for other in made if other is not unneeded]
                made = made if judge(without).problems else without
            return judge(made)
    return None
