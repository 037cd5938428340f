"""DiffusionGemma's layers in one sweep, encoder and decoder at once, over transformers' own submodules and weights.

A layer is transformers' decoder layer taken apart: the same attention, norms, dense MLP, router and experts, under
the same names, with both of its layer scalars (the encoder's for clean tokens, the decoder's for canvas tokens).
What is ours is the order in which they are called and the mask that lets one sequence hold both modes (`masks.py`).

Shapes: B rows, T tokens, H hidden. Source: transformers `DiffusionGemmaDecoderTextLayer.forward`,
`DiffusionGemmaDecoderModel.forward`.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

from ds_dgemma.model.masks import TokenLayout, attention_masks
from ds_dgemma.model.routing import ExpertLoads, expert_load
from ds_dgemma.model.spec import text_spec
from ds_dgemma.model.vocabulary import TiedVocabulary


class SweepLayer(nn.Module):
    """One layer for both modes; also the unit of activation checkpointing and of ZeRO-3's gathers."""

    layer_scalar: Tensor
    encoder_layer_scalar: Tensor
    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    pre_feedforward_layernorm: nn.Module
    mlp: nn.Module
    post_feedforward_layernorm: nn.Module
    post_feedforward_layernorm_1: nn.Module
    pre_feedforward_layernorm_2: nn.Module
    router: nn.Module
    experts: Any  # transformers', or DeepSpeed's expert-parallel layer in their place
    post_feedforward_layernorm_2: nn.Module

    def __init__(self, decoder_layer: Any, encoder_layer: Any) -> None:
        super().__init__()
        for name, child in decoder_layer.named_children():
            self.add_module(name, child)
        self.register_buffer("layer_scalar", decoder_layer.layer_scalar)
        self.register_buffer("encoder_layer_scalar", encoder_layer.layer_scalar)

    def forward(
        self,
        hidden_BTH: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        is_canvas_BT: Tensor,
        is_real_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the layer's output, [B, T, H], and its `expert_load` of the real tokens, [2, E]: empty when none are
        named; cos and sin [B, T, head dim], mask [B, 1, T, T] bool.
        """
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_BTH), position_embeddings=(cos, sin), attention_mask=mask
        )
        residual = hidden_BTH + self.post_attention_layernorm(attended)
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(residual)))
        flat = residual.flatten(0, -2)
        probability, weights, experts = self.router(flat)  # reads the raw residual, the experts a normed one
        load = flat.new_empty(0) if is_real_BT is None else expert_load(probability, experts, is_real_BT.flatten())
        sparse = self.experts(self.pre_feedforward_layernorm_2(flat), experts, weights).view_as(residual)
        mixed = dense + self.post_feedforward_layernorm_2(sparse)
        hidden = residual + self.post_feedforward_layernorm(mixed)
        # ZeRO-3 leaves buffers in fp32
        scalar = torch.where(is_canvas_BT.unsqueeze(-1), self.layer_scalar, self.encoder_layer_scalar)
        return hidden * scalar.to(hidden.dtype), load


def with_gradient(inputs: Tensor, module: nn.Module) -> Tensor:
    """The inputs of a module that trains, asked for a gradient where nothing before them trains.

    DeepSpeed finishes a leaf module's backward pass at the gradient of its inputs. Without one it reduces the leaf's
    gradients before they are there: "0 != 256 Cannot reduce scatter".
    """
    if not torch.is_grad_enabled() or inputs.requires_grad:
        return inputs
    trains = any(parameter.requires_grad for parameter in module.parameters())
    return inputs.detach().requires_grad_(True) if trains else inputs


class DiffusionGemmaStack(nn.Module):
    """Embedding, layers, final norm and self-conditioning block; parameter names are transformers' below
    `model.decoder`.
    """

    def __init__(self, source: DiffusionGemmaForBlockDiffusion, activation_checkpointing: bool) -> None:
        super().__init__()
        decoder, encoder = source.model.decoder, source.model.encoder.language_model
        text = text_spec(source.config)
        self.config: DiffusionGemmaConfig = source.config
        self.layer_types: tuple[str, ...] = tuple(text.layer_types)
        self.window: int = text.sliding_window
        self.activation_checkpointing = activation_checkpointing
        embedding = decoder.embed_tokens
        self.embed_tokens = TiedVocabulary(
            embedding, softcap=text.final_logit_softcapping, embed_scale=embedding.scalar_embed_scale
        )
        self.self_conditioning = decoder.self_conditioning
        self.layers = nn.ModuleList(
            SweepLayer(layer, twin) for layer, twin in zip(decoder.layers, encoder.layers, strict=True)
        )
        self.norm = decoder.norm
        self.rotary_emb = decoder.rotary_emb

    def sweep_layers(self) -> Iterable[SweepLayer]:
        """The layers in order."""
        return cast(Iterable[SweepLayer], self.layers)

    def forward(self, inputs_BTH: Tensor, layout: TokenLayout, loads: ExpertLoads | None = None) -> Tensor:
        """Sweep once: input embeddings [B, T, H] to normed hidden states [B, T, H]; fills `loads`."""
        masks = attention_masks(layout, self.window)
        rotary = {kind: self.rotary_emb(inputs_BTH, layout.position_BT, kind) for kind in set(self.layer_types)}
        hidden, is_canvas = inputs_BTH, layout.is_canvas_BT
        is_real = None if loads is None else loads.is_real_BT
        for layer, kind in zip(self.sweep_layers(), self.layer_types, strict=True):
            arguments = (with_gradient(hidden, layer), *rotary[kind], masks[kind], is_canvas, is_real)
            if self.activation_checkpointing and torch.is_grad_enabled():
                hidden, load = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                hidden, load = layer(*arguments)
            if loads is not None:
                loads.layers.append(load)
        return self.norm(hidden)
