"""What a checkpoint says of itself, read from its config.json alone: no weights, no model.

The classes are transformers' own. An `auto_map`, which points to code beside the weights, is not followed.
"""

from collections.abc import Iterator
from os.path import expanduser
from pathlib import Path
from typing import Any

from transformers import DiffusionGemmaConfig

from ds_dgemma.errors import UserError, first_line, one_line_each

ARCHITECTURE = "DiffusionGemmaForBlockDiffusion"
# The language model's tensors in a checkpoint, and what transformers ties to them
DECODER, ENCODER = "model.decoder.", "model.encoder.language_model."
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "num_experts", "top_k_experts", "sliding_window",
)  # fmt: skip


def read_spec(path: str, revision: str | None = None) -> DiffusionGemmaConfig:
    """Read the transformers config of a local directory or a hub id.

    Raises:
        UserError: nothing there, unreadable, another architecture, no canvas length, weights that are not shared, that
            are quantized or elsewhere, or sizes that no model can have.
    """
    is_local = check_path(path, revision)
    if is_local and not (Path(path) / "config.json").is_file():
        raise UserError(f"model.path: {path} has no config.json. Give a transformers checkpoint directory or a hub id.")
    try:
        settings, _ = DiffusionGemmaConfig.get_config_dict(path, revision=revision)
        kind = settings.get("model_type")
        config = DiffusionGemmaConfig.from_dict(settings) if kind == DiffusionGemmaConfig.model_type else None
    except Exception as error:  # a wrong type in config.json surfaces as any kind
        neither = "" if is_local else "is no directory and "
        raise UserError(
            f"model.path: {path} {neither}could not be read as a checkpoint: {first_line(error)}"
        ) from error
    if config is None:
        raise UserError(f"model.path: {path} is a {kind} checkpoint; {ARCHITECTURE} was expected.")
    if not isinstance(config.canvas_length, int) or config.canvas_length < 1:
        raise UserError(
            f"model.path: {path}/config.json has canvas_length {config.canvas_length}, at least 1 is expected."
        )
    for key in ("quantization_config", "transformers_weights"):
        if settings.get(key):  # transformers would read the weights in another way than we do
            raise UserError(
                f"model.path: {path}/config.json has {key}, which is not supported. If the weights are plain, in "
                "model.safetensors or its shards, remove it."
            )
    if not config.tie_word_embeddings:
        raise UserError(
            f"model.path: {path}/config.json has tie_word_embeddings false: encoder and decoder would have weights of "
            f"their own. {ARCHITECTURE} is trained with shared ones, true is expected."
        )
    if problems := list(_impossible(text_spec(config))):
        raise one_line_each(f"model.path: {path}/config.json, text_config", problems)
    return config


def _impossible(text: Any) -> Iterator[str]:
    """Numbers that no model can have; transformers would build it all the same, or fail without naming them."""
    if text.num_hidden_layers < 1:
        yield f"num_hidden_layers = {text.num_hidden_layers}, a whole number from 1 is expected."
    if text.attention_dropout:
        yield f"attention_dropout = {text.attention_dropout}, which is not supported; 0 is expected."
    cap = text.final_logit_softcapping
    if not isinstance(cap, int | float) or cap <= 0:
        yield f"final_logit_softcapping = {cap}, a number above 0 is expected."
    for number, layer in enumerate(text.per_layer_config):
        for key in SIZES:
            least = 2 if key == "sliding_window" else 1  # of a window of 1 transformers' cache keeps every key
            if not isinstance(size := getattr(layer, key), int) or size < least:
                yield f"{key} = {size} in layer {number}, a whole number from {least} is expected."
                return
        if layer.top_k_experts > layer.num_experts:
            yield f"top_k_experts = {layer.top_k_experts}, at most num_experts, {layer.num_experts}, is expected."
            return
    if text.pad_token_id is not None and not 0 <= text.pad_token_id < text.vocab_size:
        yield f"pad_token_id = {text.pad_token_id}, from 0 to vocab_size - 1, {text.vocab_size - 1}, is expected."


def check_path(path: str, revision: str | None) -> bool:
    """Whether `path` is a directory; if not, it is a hub id.

    Raises:
        UserError: meant as a directory and none, or a directory with a revision.
    """
    if Path(path).is_dir():
        if revision is not None:
            raise UserError(f"revision {revision}: {path} is a directory, only hub ids have revisions. Leave it out.")
        return True
    if path.startswith("~"):
        raise UserError(f"model.path: {path} does not exist: ~ is not expanded. Give {expanduser(path)}.")
    if path.startswith((".", "/")) or path.count("/") > 1:
        raise UserError(f"model.path: {path} does not exist. Give a transformers checkpoint directory or a hub id.")
    return False


def text_spec(config: DiffusionGemmaConfig) -> Any:
    """The language model's part of a config; untyped, for transformers declares every field optional."""
    return config.text_config
