"""What preset `shapes` of a tiny checkpoint has beside its text model: a vision tower whose random weights are of use.

Gemma 4's tower and image processor, small: patches of 4 x 4 pixels, 2 x 2 of them a soft token. A square image becomes
64 x 64 pixels and 64 soft tokens; an image of that size is not rescaled.

The tower stays as it is in training, so it must not lose what an image shows. transformers' own initialisation does: a
patch gives numbers near 0, a position gives 1, and a layer adds 1, whatever it sees. Here a patch weighs most.
"""

from typing import Any

from torch import nn
from transformers import DiffusionGemmaForBlockDiffusion, Gemma4ImageProcessorPil

PATCH, POOLING = 4, 2  # pixels; patches
SOFT_TOKENS = 70  # of an image at most; the processor allows no less
POSITION_STD = 0.2  # of a patch's number for its column or row, beside 1 for its pixels
LAYER_SCALE = 0.3  # what an attention or MLP adds, beside the same 1

VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "patch_size": PATCH,
    "pooling_kernel_size": POOLING,
    "position_embedding_size": POOLING * SOFT_TOKENS,  # an image may be one soft token high
}

CHARACTERS = [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *"abcdefghijklmnopqrstuvwxyz", *"0123456789", *" .,:?", "\n"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|turn>' + ('model' if message.role == 'assistant' else message.role) }}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{{ '<|image|>' if part.type == 'image' else part.text }}"
    "{% endfor %}{% endif %}{{ '<turn|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|turn>model' }}{% endif %}"
)


def image_processor() -> Gemma4ImageProcessorPil:
    """Return the processor for the tower's sizes."""
    return Gemma4ImageProcessorPil(patch_size=PATCH, pooling_kernel_size=POOLING, max_soft_tokens=SOFT_TOKENS)


def initialise_vision(model: DiffusionGemmaForBlockDiffusion) -> None:
    """Draw the tower's weights, and those that project its features, so that soft tokens tell what is where."""
    encoder: Any = model.model.encoder
    tower, projection = encoder.vision_tower, encoder.embed_vision.embedding_projection.weight
    embedder = tower.patch_embedder
    nn.init.normal_(embedder.input_proj.weight, std=embedder.input_proj.in_features**-0.5)
    nn.init.normal_(embedder.position_embedding_table, std=POSITION_STD)
    for layer in tower.encoder.layers:
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            nn.init.constant_(norm.weight, LAYER_SCALE)
    # features have a deviation of 1; soft tokens get that of a text's embeddings, which are scaled by sqrt(hidden)
    text: Any = model.config.text_config
    nn.init.normal_(projection, std=text.initializer_range * (text.hidden_size / projection.shape[1]) ** 0.5)
