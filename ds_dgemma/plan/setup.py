"""The choices that memory and arithmetic depend on, apart from the model: ranks, batch, ZeRO; an example's shape."""

from dataclasses import dataclass
from typing import Any

from ds_dgemma.config.run import RunConfig
from ds_dgemma.engine.ds_config import DTYPES, zero_config
from ds_dgemma.engine.optimizers import is_muon_matrix
from ds_dgemma.errors import UserError
from ds_dgemma.model.sweep import Checkpointing
from ds_dgemma.plan.inventory import Parameter

SOFT_TOKENS = 280  # of an image, as Gemma 4's processor has it unless told otherwise
MARKS = 2  # the tokens at an image's begin and end
SENT_AS = {"fp32": 4, "fp16": 2, "bf16": 2, "bfp16": 2}  # bytes of DeepSpeed's communication_data_type


@dataclass(frozen=True)
class Setup:
    """One way to run a config."""

    gpus: int
    expert_parallel_size: int
    global_batch_size: int
    micro_batch_size: int
    activation_checkpointing: Checkpointing
    logits_chunk_mib: int
    balances_routers: bool
    muon: bool
    element: int  # bytes of a weight
    sent: int  # bytes of a gradient's element on its way
    stage: int
    offload_optimizer: bool
    offload_param: bool
    zero: Any  # the rest of DeepSpeed's reading of its ZeRO block; sizes in elements

    @property
    def accumulation(self) -> int:
        """Micro-batches of one optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.gpus)

    @property
    def forwards(self) -> int:
        """Of a micro-batch: one more where routers are balanced over several, to count what all of them chose."""
        return 2 if self.balances_routers and self.accumulation > 1 else 1

    def local(self, parameter: Parameter) -> int:
        """Elements of a parameter that one rank computes with."""
        return parameter.numel // self.expert_parallel_size if parameter.is_expert else parameter.numel

    def holders(self, parameter: Parameter) -> int:
        """Ranks over which ZeRO partitions what `local` counts."""
        return self.gpus // self.expert_parallel_size if parameter.is_expert else self.gpus

    def share(self, parameter: Parameter) -> int:
        """Elements of one rank's partition, padding included."""
        return -(-self.local(parameter) // self.holders(parameter))

    def is_small(self, parameter: Parameter) -> bool:
        """Whether ZeRO-3 keeps a parameter whole beside its shares."""
        return self.local(parameter) <= self.zero.param_persistence_threshold

    def comes(self, parameter: Parameter) -> bool:
        """Whether ZeRO-3 puts a parameter on the GPU that is not there: not so what one rank alone holds."""
        return self.stage == 3 and (self.holders(parameter) > 1 or self.offload_param)

    def is_muons(self, parameter: Parameter) -> bool:
        """Whether Muon updates a parameter, of which it keeps one moment where AdamW keeps two."""
        return self.muon and is_muon_matrix(parameter.name, len(parameter.shape))


@dataclass(frozen=True)
class Shape:
    """Tokens of the examples that are planned for."""

    clean: int  # prompt, response and fill
    canvases: int  # scored ones
    canvas_length: int
    images: tuple[int, ...] = ()  # soft tokens of each, among the clean ones

    @property
    def tokens(self) -> int:
        """All tokens of one example."""
        return self.clean + self.canvases * self.canvas_length

    @property
    def starts(self) -> tuple[int, ...]:
        """Where the canvases begin: they are the last of the example."""
        return tuple(max(0, self.clean - self.canvas_length * n) for n in range(self.canvases, 0, -1))


def read_setup(config: RunConfig, deepspeed: dict[str, Any], gpus: int) -> Setup:
    """The setup that `config` and DeepSpeed's joined settings ask for, which were checked to divide over `gpus`."""
    zero, element = zero_config(deepspeed), DTYPES[config.train.precision].itemsize
    return Setup(
        gpus=gpus,
        expert_parallel_size=config.parallel.expert_parallel_size,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        activation_checkpointing=config.train.activation_checkpointing,
        logits_chunk_mib=config.objective.logits_chunk_mib,
        balances_routers=config.objective.router_balance_weight > 0,
        muon=config.optimizer.type == "muon",
        element=element,
        sent=SENT_AS.get(str(deepspeed.get("communication_data_type")), element),
        stage=int(zero.stage),
        offload_optimizer=getattr(zero.offload_optimizer, "device", None) == "cpu",
        offload_param=getattr(zero.offload_param, "device", None) == "cpu",
        zero=zero,
    )


def read_shape(config: RunConfig, canvas: int, length: int | None = None, images: int = 0) -> Shape:
    """The longest example that the config lets through, or one of `length` clean tokens, with so many images.

    Raises:
        UserError: that is less than a canvas of so many tokens.
    """
    clean = length or config.data.max_length
    if clean < canvas:
        setting = f"--length {length}" if length else f"data.max_length = {clean}"
        raise UserError(f"{setting} is less than a canvas, {canvas} tokens: no example would fit. Set more.")
    wanted, most = config.objective.canvases_per_example, max(1, clean // canvas)
    soft = config.data.max_soft_tokens or SOFT_TOKENS
    if images * (soft + MARKS) + canvas > clean:
        raise UserError(f"--images {images}: of {soft} tokens each they do not fit {clean} tokens beside a canvas.")
    return Shape(clean, most if wanted == "all" else min(wanted, most), canvas, (soft,) * images)
