"""Build the stack without its weights: on the meta device, from the checkpoint's config alone."""

from typing import Any

import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

from ds_dgemma.errors import UserError, first_line
from ds_dgemma.model import attention
from ds_dgemma.model.kernel_choice import Wanted
from ds_dgemma.model.norm import replace_norms
from ds_dgemma.model.parts import ImageRule
from ds_dgemma.model.spec import text_spec
from ds_dgemma.model.stack import DiffusionGemmaStack
from ds_dgemma.model.sweep import Checkpointing


def build_stack(
    config: DiffusionGemmaConfig,
    *,
    train_router: bool = False,
    activation_checkpointing: Checkpointing = "none",
    attention_kernel: Wanted = "auto",
    image_rule: ImageRule = "generate",
    train_vision_embedding: bool = False,
) -> DiffusionGemmaStack:
    """Return the stack with meta parameters; what is computed rather than stored (rotary frequencies) is real and
    fp32.

    Raises:
        UserError: the config does not describe a model that transformers can build.
    """
    config._attn_implementation = attention.NAME
    config._experts_implementation = "eager"
    vision: Any = config.vision_config
    vision._attn_implementation = "sdpa"  # the tower is transformers' own
    with torch.device("meta"):
        try:
            source = DiffusionGemmaForBlockDiffusion(config)
        except Exception as error:  # a config's numbers that do not fit each other surface as any kind
            raise UserError(
                f"model.path: no model can be built from config.json: {type(error).__name__}: {first_line(error)}"
            ) from error
        stack = DiffusionGemmaStack(source, activation_checkpointing, image_rule, train_vision_embedding)
    replace_norms(stack)
    stack.rotary_emb = type(stack.rotary_emb)(text_spec(config))
    for layer in stack.sweep_layers():
        layer.router.requires_grad_(train_router)
        setattr(layer.self_attn, attention.WANTED, attention_kernel)
    return stack
