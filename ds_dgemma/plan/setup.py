"""The choices that memory and time depend on, apart from the model: ranks, batch, ZeRO. The search varies these."""

from dataclasses import dataclass
from typing import Any

import torch

from ds_dgemma.config.division import check_topology
from ds_dgemma.config.run import RunConfig
from ds_dgemma.engine.ds_config import DTYPES, zero_config
from ds_dgemma.engine.optimizers import is_muon_matrix
from ds_dgemma.errors import UserError
from ds_dgemma.model.sweep import Checkpointing
from ds_dgemma.plan.inventory import Inventory, Parameter

SOFT_TOKENS = 280  # of an image, as Gemma 4's processor has it unless told otherwise
MARKS = 2  # the tokens at an image's begin and end


@dataclass(frozen=True)
class Zero:
    """What DeepSpeed's JSON says of memory, its defaults filled in; sizes in elements."""

    stage: int
    reduce_bucket: int
    prefetch_bucket: int
    reuses: bool  # keeps a weight whole for a use that follows at once
    persistence_threshold: int
    sub_group: int
    overlap: bool
    contiguous: bool
    communication_bytes: int  # an element of a gradient on its way
    offload_optimizer: bool
    offload_parameters: bool


@dataclass(frozen=True)
class Setup:
    """One way to run a config."""

    gpus: int
    expert_parallel_size: int
    global_batch_size: int
    micro_batch_size: int
    activation_checkpointing: Checkpointing
    balances_routers: bool
    muon: bool
    dtype: torch.dtype
    zero: Zero

    @property
    def element(self) -> int:
        """Bytes of a weight."""
        return self.dtype.itemsize

    @property
    def accumulation(self) -> int:
        """Micro-batches of one optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.gpus)

    def guesses(self, shape: "Shape", probability: float) -> tuple[float, float]:
        """First guesses of a micro-batch, as many as are expected: those of a coin, and those to stay in step."""
        canvases = self.micro_batch_size * shape.canvases
        return probability * canvases, (1 - probability) ** canvases

    @property
    def counting_passes(self) -> int:
        """Forwards of every micro-batch before the first backward: what all routers chose is counted first."""
        return 1 if self.balances_routers and self.accumulation > 1 else 0

    def local(self, parameter: Parameter) -> int:
        """Elements of a parameter that one rank computes with."""
        return parameter.numel // self.expert_parallel_size if parameter.is_expert else parameter.numel

    def holders(self, parameter: Parameter) -> int:
        """Ranks over which ZeRO partitions what `local` counts."""
        return self.gpus // self.expert_parallel_size if parameter.is_expert else self.gpus

    def is_muons(self, parameter: Parameter) -> bool:
        """Whether Muon updates a parameter, of which it keeps one moment where AdamW keeps two."""
        return self.muon and is_muon_matrix(parameter.name, len(parameter.shape))

    def share(self, parameter: Parameter) -> int:
        """Elements of one rank's partition, padding included."""
        return -(-self.local(parameter) // self.holders(parameter))


@dataclass(frozen=True)
class Shape:
    """Tokens of the examples that are planned for."""

    clean: int  # prompt, response and fill
    canvases: int  # scored ones
    canvas_length: int
    images: tuple[int, ...] = ()  # soft tokens of each, among the clean ones

    @property
    def canvas(self) -> int:
        """Canvas tokens of an example."""
        return self.canvases * self.canvas_length

    @property
    def tokens(self) -> int:
        """All tokens of one example."""
        return self.clean + self.canvas

    @property
    def starts(self) -> tuple[int, ...]:
        """Where the canvases begin: they are the last of the example."""
        return tuple(max(0, self.clean - self.canvas_length * n) for n in range(self.canvases, 0, -1))


def read_setup(config: RunConfig, deepspeed: dict[str, Any], gpus: int) -> Setup:
    """The setup that `config` and DeepSpeed's joined settings ask for.

    Raises:
        UserError: the batch or the expert groups do not divide over `gpus`.
    """
    check_topology(config, gpus)
    dtype = DTYPES[config.train.precision]
    return Setup(
        gpus=gpus,
        expert_parallel_size=config.parallel.expert_parallel_size,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        activation_checkpointing=config.train.activation_checkpointing,
        balances_routers=config.objective.router_balance_weight > 0,
        muon=config.optimizer.type == "muon",
        dtype=dtype,
        zero=read_zero(deepspeed, dtype),
    )


def read_zero(deepspeed: dict[str, Any], dtype: torch.dtype) -> Zero:
    """What DeepSpeed's settings say of memory, for weights of `dtype`."""
    zero = zero_config(deepspeed)
    communication = {"fp32": 4, "fp16": 2, "bf16": 2, "bfp16": 2}.get(
        str(deepspeed.get("communication_data_type")), dtype.itemsize
    )
    return Zero(
        stage=int(zero.stage),
        reduce_bucket=zero.reduce_bucket_size,
        prefetch_bucket=zero.prefetch_bucket_size,
        reuses=zero.max_reuse_distance > 0,
        persistence_threshold=zero.param_persistence_threshold,
        sub_group=zero.sub_group_size,
        overlap=bool(zero.overlap_comm),
        contiguous=zero.contiguous_gradients,
        communication_bytes=communication,
        offload_optimizer=_on_cpu(zero.offload_optimizer),
        offload_parameters=_on_cpu(zero.offload_param),
    )


def read_shape(config: RunConfig, inventory: Inventory, length: int | None = None, images: int = 0) -> Shape:
    """The longest example that the config lets through, or one of `length` clean tokens, with so many images.

    Raises:
        UserError: that is less than a canvas.
    """
    clean, canvas = length or config.data.max_length, inventory.canvas_length
    if clean < canvas:
        setting = f"--length {length}" if length else f"data.max_length = {clean}"
        raise UserError(f"{setting} is less than a canvas, {canvas} tokens: no example would fit. Set more.")
    wanted = config.objective.canvases_per_example
    most = max(1, clean // canvas)
    soft = config.data.max_soft_tokens or SOFT_TOKENS
    if images * (soft + MARKS) + canvas > clean:
        raise UserError(f"--images {images}: of {soft} tokens each they do not fit {clean} tokens beside a canvas.")
    canvases = most if wanted == "all" else min(wanted, most)
    return Shape(clean, canvases, canvas, (soft,) * images)


def _on_cpu(offload: Any) -> bool:
    return offload is not None and str(getattr(offload.device, "value", offload.device)) == "cpu"
