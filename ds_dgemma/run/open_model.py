"""From a checkpoint directory to a stack that DeepSpeed can wrap, each rank holding only its own part.

Two stages: `outline_model` builds on meta and checks every name and shape, so a wrong checkpoint is refused on all
ranks before any of them waits for another; `fill_model` makes the shards and reads them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import DiffusionGemmaConfig

from ds_dgemma.checkpoint.load import check_places, materialise, plain
from ds_dgemma.checkpoint.pretrained import Pretrained
from ds_dgemma.checkpoint.progress import ReadProgress
from ds_dgemma.checkpoint.run_state import StateReader
from ds_dgemma.checkpoint.weights import WeightReader
from ds_dgemma.config.division import check_experts
from ds_dgemma.config.run import LoraSection, RunConfig
from ds_dgemma.engine.adapters import Adapters, attach_adapters, choose_adapters
from ds_dgemma.engine.ds_config import DTYPES
from ds_dgemma.engine.expert_parallel import place_experts
from ds_dgemma.engine.sharding import zero3
from ds_dgemma.model.build import build_stack
from ds_dgemma.model.kernel_choice import Wanted
from ds_dgemma.model.names import Place, is_expert, places_of
from ds_dgemma.model.parts import ImageRule
from ds_dgemma.model.spec import text_spec
from ds_dgemma.model.stack import DiffusionGemmaStack
from ds_dgemma.model.sweep import Checkpointing
from ds_dgemma.model.trainable import freeze, trained_names
from ds_dgemma.ranks.layout import RankLayout, agreed


@dataclass(frozen=True)
class OutlinedModel:
    """A stack on meta, and where in the checkpoint its tensors lie."""

    stack: DiffusionGemmaStack
    reader: WeightReader
    places: dict[str, Place]
    expert_parallel_size: int
    adapters: Adapters | None = None

    @property
    def trained_names(self) -> list[str]:
        """The names, as in the checkpoint, of all that will be trained."""
        return trained_names(self.stack) + (self.adapters.names() if self.adapters else [])

    @property
    def trained_sizes(self) -> dict[str, int]:
        """Elements, over all ranks, of every logical tensor of the training state."""
        sizes = self.adapters.sizes() if self.adapters else {}
        for name, parameter in self.stack.named_parameters():
            if parameter.requires_grad:
                parts = self.expert_parallel_size if is_expert(name) else 1
                sizes[f"model.{name}"] = parts * parameter.numel()
        return sizes


def outline_run(config: RunConfig, model: Pretrained, ranks: RankLayout, resumed: bool) -> OutlinedModel:
    """What a run trains, on meta; see `outline_model`. Resumed adapters are read from the training state."""
    grouped = config.parallel.grouped_matmul
    return outline_model(
        model.spec,
        model.directory,
        ranks,
        grouped_matmul=ranks.device.type == "cuda" if grouped == "auto" else grouped == "on",
        train_router=config.model.train_router,
        activation_checkpointing=config.train.activation_checkpointing,
        attention_kernel=config.model.attention,
        image_rule=config.model.image_attention,
        train_vision_embedding=config.model.train_vision_embedding,
        copy_decoder_scalars=config.model.missing_encoder_scalars == "copy_decoder",
        frozen=config.model.freeze,
        lora=config.lora.model_copy(update={"path": None}) if config.lora and resumed else config.lora,
    )


def outline_model(
    spec: DiffusionGemmaConfig,
    directory: Path,
    ranks: RankLayout,
    *,
    grouped_matmul: bool,
    train_router: bool = False,
    activation_checkpointing: Checkpointing = "full",
    attention_kernel: Wanted = "auto",
    image_rule: ImageRule = "generate",
    train_vision_embedding: bool = False,
    copy_decoder_scalars: bool = False,
    frozen: Sequence[str] = (),
    lora: LoraSection | None = None,
) -> OutlinedModel:
    """Build on meta with this rank's experts and find every tensor; no collective, no weights read.

    Raises:
        UserError: the experts do not divide, the checkpoint lacks tensors or has them in other shapes, or the patterns
        of `frozen` or `lora` do not fit the model.
    """
    size = ranks.expert_parallel_size
    stack = build_stack(
        spec,
        train_router=train_router,
        activation_checkpointing=activation_checkpointing,
        attention_kernel=attention_kernel,
        image_rule=image_rule,
        train_vision_embedding=train_vision_embedding,
    )
    check_experts(text_spec(spec).num_experts, size, ranks.world)
    place_experts(stack, size, ranks.expert_rank, grouped_matmul)
    adapters = choose_adapters(stack, lora, grouped_matmul) if lora else None  # which freezes all else
    if not lora:
        freeze(stack, frozen)
    places, reader = places_of(stack, ranks.expert_rank), WeightReader(directory)
    places = check_places(stack, places, reader, copy_decoder_scalars=copy_decoder_scalars)
    return OutlinedModel(stack, reader, places, size, adapters)


def fill_model(
    outlined: OutlinedModel,
    ranks: RankLayout,
    deepspeed_config: dict[str, Any],
    precision: str,
    trained: StateReader | None = None,
    seed: int = 0,
) -> DiffusionGemmaStack:
    """Make this rank's parameters real and read them: from `trained` what a resumed run has trained, else from the
    checkpoint. New adapters are drawn by `seed`. A collective.
    """
    dtype = DTYPES[precision]
    if deepspeed_config.get("zero_optimization", {}).get("stage", 0) == 3:
        make_real = zero3(deepspeed_config, dtype, ranks.expert_parallel_size)
    else:
        make_real = plain(dtype, ranks.device)
    stack, reader = outlined.stack, outlined.reader

    def bytes_read() -> int:
        return reader.bytes_read + (trained.bytes_read if trained else 0)

    elements = sum(parameter.numel() for parameter in stack.parameters())
    progress = ReadProgress(str(reader.directory), elements, bytes_read, shown=ranks.is_main)
    with agreed(ranks), progress:
        materialise(
            stack,
            reader,
            outlined.places,
            make_real,
            device=ranks.device,
            expert_rank=ranks.expert_rank,
            trained=trained,
            advance=progress.advance,
        )
        if outlined.adapters is not None:
            attach_adapters(
                stack, outlined.adapters, make_real, expert_rank=ranks.expert_rank, trained=trained, seed=seed
            )
    reader.close()
    return stack
