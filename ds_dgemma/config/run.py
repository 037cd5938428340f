"""Every setting of a run, as strict pydantic sections: one YAML file per run, the only home of defaults.

YAML owns the science (batch, learning rate, steps, clipping, canvases, expert ranks); the DeepSpeed JSON that
`deepspeed` names owns how ZeRO runs. `config/file.py` reads a file and applies overrides,
`engine/ds_config.py` joins the two.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from ds_dgemma.config.data import DataSection
from ds_dgemma.config.evaluation import EvaluationSection, ValidationSection
from ds_dgemma.config.optimizer import OptimizerSection, Pattern, check_expression
from ds_dgemma.config.section import MAY_CHANGE, Section
from ds_dgemma.config.tracking import TrackingSection

ATTENTION_AND_MLP = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def _named(path: Path) -> Path:
    if path == Path():
        raise ValueError("an empty path is the current directory: give a name")
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"~ has no meaning here: {error}") from None


NamedPath = Annotated[Path, AfterValidator(_named)]


class RunSection(Section):
    """Where a run lives and how it starts again."""

    dir: NamedPath = Field(description="run directory: config.yaml, metrics.jsonl, checkpoints/, plots/")
    resume: str = Field(
        default="auto",
        min_length=1,
        description="auto: continue from the newest complete checkpoint; never: refuse a used directory; "
        "or the path of one checkpoint",
    )


class ModelSection(Section):
    """The checkpoint to start from."""

    path: Annotated[str, MAY_CHANGE] = Field(description="a local transformers directory or a hub id")
    revision: Annotated[str | None, MAY_CHANGE] = Field(default=None, description="branch, tag or commit of the hub id")
    train_router: bool = Field(default=False, description="train the expert routers too; frozen by default")
    freeze: tuple[Pattern, ...] = Field(
        default=(),
        description="patterns of checkpoint parameter names that are not trained: `*.experts.*`, "
        "`*.embed_tokens.weight`; a regular expression after `re:`",
    )
    image_attention: Literal["generate", "sliding"] = Field(
        default="generate",
        description="which tokens of an image see each other. generate: all, on every layer, as transformers' "
        "generate() has it; sliding: all, on sliding layers within the window, as Gemma 4 and Google's code have it",
    )
    train_vision_embedding: bool = Field(
        default=False, description="train what projects the vision tower's output; the tower itself is frozen"
    )
    missing_encoder_scalars: Literal["error", "copy_decoder"] = Field(
        default="error",
        description="a checkpoint without the encoder's layer scalars is refused, or gets the decoder's",
    )
    attention: Annotated[Literal["auto", "sdpa", "flash_attn_4", "ffpa"], MAY_CHANGE] = Field(
        default="auto",
        description="attention kernels. auto: the fastest that are installed, fit the GPU and the layer, and pass a "
        "comparison with torch's; sdpa: torch's; a package's: where it fits, elsewhere torch's (head sizes up to 256: "
        "flash_attn_4; 512: ffpa)",
    )


class LoraSection(Section):
    """Low-rank adapters on a frozen base, with PEFT's names and meanings.

    Patterns are matched with the names of the language model's linears in the checkpoint,
    `model.decoder.layers.0.self_attn.q_proj`, or with the encoder's name of the same weights. The vision tower never
    gets an adapter.
    """

    r: int = Field(default=8, ge=1, le=2**16, description="rank of every adapter, of each expert's too")
    lora_alpha: float = Field(default=8, gt=0, description="an adapter's output is scaled by lora_alpha / r")
    lora_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="dropout on an adapter's input, drawn by each rank; 0 with target_parameters",
    )
    target_modules: tuple[str, ...] | str | None = Field(
        default=ATTENTION_AND_MLP,
        description="linears that get an adapter: a list of name endings, one regular expression for whole names, or "
        "all-linear; null: none",
    )
    exclude_modules: tuple[str, ...] | str | None = Field(
        default=None, description="linears that get none all the same: name endings, or one regular expression"
    )
    target_parameters: tuple[str, ...] = Field(
        default=(),
        description="endings of the experts' tensors, a pair for each expert: "
        "[experts.gate_up_proj, experts.down_proj]",
    )
    use_rslora: bool = Field(default=False, description="scale by lora_alpha / sqrt(r) instead")
    init_lora_weights: bool | Literal["gaussian"] = Field(
        default=True,
        description="true: A uniform (Kaiming), B zero; gaussian: A normal with deviation 1 / r, B zero; false: both "
        "random",
    )
    path: Path | None = Field(default=None, description="a PEFT adapter directory to continue from")

    @model_validator(mode="after")
    def _possible(self) -> "LoraSection":
        for key in ("target_modules", "exclude_modules"):
            if isinstance(pattern := getattr(self, key), str):
                check_expression(pattern, f"{key} ")
        if not self.target_modules and not self.target_parameters:
            raise ValueError("nothing would get an adapter: give target_modules, target_parameters or both")
        if self.lora_dropout and self.target_parameters:
            raise ValueError(
                f"lora_dropout {self.lora_dropout} cannot go with target_parameters: PEFT has no dropout there, set 0"
            )
        return self


class TrainSection(Section):
    """Length, batch and arithmetic of a run."""

    max_steps: int = Field(ge=1, le=10**9, description="optimizer steps")
    early_stopping_patience: Annotated[int, MAY_CHANGE] = Field(
        default=0,
        ge=0,
        description="measurements of checkpoint.best_by in a row without a better one that end the run; 0: none do",
    )
    global_batch_size: int = Field(ge=1, le=10**9, description="examples per optimizer step, over all ranks")
    micro_batch_size: Annotated[int, MAY_CHANGE] = Field(
        ge=1, le=10**9, description="examples per rank and forward; accumulation follows"
    )
    precision: Literal["bf16", "fp32"] = Field(
        default="bf16", description="compute type; master weights and accumulated gradients are fp32 in both"
    )
    gradient_clipping: float = Field(default=1.0, ge=0, description="largest global gradient norm; 0 clips nothing")
    activation_checkpointing: Annotated[Literal["full", "selective", "none"], MAY_CHANGE] = Field(
        default="full",
        description="full: keep a layer's input, compute the rest again in the backward pass; selective: keep its "
        "attention's output too, which is dear at length; none: keep everything",
    )


class ParallelSection(Section):
    """How ranks share the experts."""

    expert_parallel_size: int = Field(default=1, ge=1, description="ranks that split each layer's experts")
    expert_groups_across_nodes: bool = Field(
        default=False,
        description="allow such ranks on several nodes: every layer then sends its tokens over their network",
    )
    grouped_matmul: Literal["auto", "on", "off"] = Field(
        default="auto", description="grouped matrix multiplication for experts; auto: on with CUDA"
    )
    collective_timeout_minutes: float = Field(
        default=30.0, ge=0.1, le=1e5, description="a collective that takes longer ends the run"
    )


NoiseSchedule = Literal["uniform", "cosine", "logit_normal"]  # objective/schedules.py
LossName = Literal["base", "reweighted", "leave_one_out", "reweighted_leave_one_out"]  # objective/losses.py


class ObjectiveSection(Section):
    """The two-part block-diffusion loss (DiffusionGemma; gemma/diffusion `hd/sft_model.py`)."""

    loss: LossName = Field(
        default="base",
        description="of a canvas token: cross-entropy; reweighted: times 1 / (1 - t), 100 at most; leave_one_out: the "
        "model learns what the other tokens say of a token, and its loss joins to that what the token itself says; "
        "both. t: the canvas's noise level",
    )
    noise_schedule: NoiseSchedule = Field(
        default="uniform",
        description="noise levels between noise_eps and noise_max: all alike; cosine: more high ones; logit_normal: "
        "more in the middle",
    )
    noise_eps: float = Field(
        default=1e-3, ge=0, lt=1, description="least noise level, the share of tokens that are drawn anew"
    )
    noise_max: float = Field(default=1.0, gt=0, le=1, description="largest noise level; noise_eps: the only one")
    self_conditioning_probability: float = Field(
        default=0.5, ge=0, le=1, description="chance that the second pass sees the first one's guess"
    )
    encoder_loss_weight: float = Field(default=1.0, ge=0, description="weight of the encoder's next-token loss")
    ar_tokens: Literal["all", "learned"] = Field(
        default="all",
        description="tokens that the encoder's next-token loss covers: all, prompts too (the model's own recipe); "
        "learned: answers alone",
    )
    router_balance_weight: float = Field(
        default=0.0,
        ge=0,
        description="weight of the routers' load-balance loss (Switch Transformer's; the mean over layers), for "
        "model.train_router; with accumulation it costs one more forward a micro-batch",
    )
    canvases_per_example: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        default=1, description="canvases denoised per example and step, drawn without replacement; or all"
    )
    logits_chunk_mib: Annotated[int, MAY_CHANGE] = Field(
        default=256, ge=1, le=2**20, description="largest piece of fp32 logits held at once, MiB"
    )

    @model_validator(mode="after")
    def _some_noise(self) -> "ObjectiveSection":
        if self.noise_max < self.noise_eps:
            raise ValueError(f"noise_max {self.noise_max} is below noise_eps {self.noise_eps}")
        return self


class CheckpointSection(Section):
    """When the training state is written and how much of it is kept."""

    every: int = Field(default=500, ge=0, description="steps between checkpoints; 0: only the last step")
    keep_last: int = Field(default=2, ge=1, description="newest complete checkpoints kept")
    keep_every: int = Field(
        default=0, ge=0, description="checkpoints at multiples of this many steps are kept for ever; 0: none"
    )
    keep_best: int = Field(
        default=0, ge=0, description="checkpoints of the best measure (best_by) that are kept too; 0: none"
    )
    best_by: str = Field(
        default="validation/loss",
        pattern=r"^(validation|evaluation)/\w[\w.]*$",
        description="what makes a checkpoint the best: validation/loss, loss_diffusion, loss_ar, accuracy, or at one "
        "noise level (validation/loss_diffusion_at_0.5); evaluation/ and a share of its task, or stopped, "
        "steps_per_canvas",
    )
    on_error: Literal["stop", "continue"] = Field(
        default="stop",
        description="a checkpoint that cannot be written (full disk, quota, rights) ends the run; or is told and "
        "tried again when the next is due, the last step's always ending it",
    )

    @model_validator(mode="after")
    def _possible(self) -> "CheckpointSection":
        if self.keep_every and (not self.every or self.keep_every % self.every):
            written = f"every {self.every} steps" if self.every else "at the last step only"
            raise ValueError(
                f"keep_every {self.keep_every} cannot be met: checkpoints are written {written}. Set a multiple of "
                "checkpoint.every, or 0"
            )
        return self


class HealthSection(Section):
    """When numbers go bad. A step with NaN or infinity in a loss or the gradient is always skipped, on every rank."""

    max_bad_steps: int = Field(default=10, ge=1, description="skipped steps in a row that end the run (exit code 5)")
    spike_factor: float = Field(
        default=10.0,
        ge=0,
        description="a loss so many robust deviations above the median of recent ones is told as a spike; 0: none is",
    )
    spike_window: int = Field(default=50, ge=20, description="recent losses that spikes are measured against")


class RunConfig(Section):
    """One run."""

    run: Annotated[RunSection, MAY_CHANGE]
    seed: int = Field(default=0, ge=0, description="key of data order and of all noise")
    model: ModelSection
    lora: LoraSection | None = Field(
        default=None, description="train low-rank adapters on a frozen base; null: train the model itself"
    )
    data: DataSection
    train: TrainSection
    parallel: Annotated[ParallelSection, MAY_CHANGE] = ParallelSection()
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    validation: Annotated[ValidationSection, MAY_CHANGE] = ValidationSection()
    evaluation: Annotated[EvaluationSection, MAY_CHANGE] = EvaluationSection()
    checkpoint: Annotated[CheckpointSection, MAY_CHANGE] = CheckpointSection()
    health: Annotated[HealthSection, MAY_CHANGE] = HealthSection()
    tracking: Annotated[TrackingSection, MAY_CHANGE] = TrackingSection()
    deepspeed: Annotated[Path, MAY_CHANGE] = Field(description="DeepSpeed's JSON, passed to DeepSpeed whole")
