"""DiffusionGemma's layers for encoder and decoder at once, over transformers' own submodules and weights.

A layer is transformers' decoder layer taken apart: the same attention, norms, dense MLP, router and experts, under
the same names, with both of its layer scalars (the encoder's for clean tokens, the decoder's for canvas tokens).
What is ours is the order in which they are called (`sweep.py`) and the attention that lets one flat sequence hold both
modes (`attention.py`).

Shapes: N tokens of a call, H hidden, k experts per token. Source: transformers
`DiffusionGemmaDecoderTextLayer.forward`, `DiffusionGemmaDecoderModel.forward`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

from ds_dgemma.model.dropout import PartDropout
from ds_dgemma.model.parts import ImageRule
from ds_dgemma.model.routing import expert_load, weights_of
from ds_dgemma.model.spec import text_spec
from ds_dgemma.model.sweep import Call, Checkpointing, LayerOutput
from ds_dgemma.model.vision import EMBEDDING, Vision
from ds_dgemma.model.vocabulary import TiedVocabulary

LANGUAGE = ("model.decoder.", "model.encoder.language_model.", "lm_head.")  # names in transformers' model


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

    def __init__(self, decoder_layer: Any, encoder_layer: Any, kind: str, dropout: PartDropout) -> None:
        super().__init__()
        for name, child in decoder_layer.named_children():
            self.add_module(name, child)
        self.register_buffer("layer_scalar", decoder_layer.layer_scalar)
        self.register_buffer("encoder_layer_scalar", encoder_layer.layer_scalar)
        self.kind = kind
        self._dropout = dropout

    def forward(self, *hidden_1NH: Tensor, job: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Do `job` with `hidden_1NH`: under ZeRO-3 the layer's weights are whole in here, and nowhere else."""
        return job(*hidden_1NH)

    def block(
        self,
        hidden_1NH: Tensor,
        call: Call,
        kept: Sequence[Tensor] = (),
        chosen_Nk: Tensor | None = None,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> LayerOutput:
        """Compute the layer for the tokens of `call`; `kept` and `known` are for `attention.attention`, `chosen_Nk`
        are experts that an earlier call has chosen.
        """
        with self._dropout.of(call.dropout):
            attended, left = self.self_attn(
                self.input_layernorm(hidden_1NH),
                position_embeddings=call.rotary[self.kind],
                attention_mask=None,
                tokens=call.tokens,
                kept=kept,
                known=known,
            )
            if call.tokens.cache is not None and call.tokens.cache.keys_only:
                return LayerOutput(hidden_1NH, hidden_1NH.new_empty(0), torch.empty(0), left)
            residual = hidden_1NH + self.post_attention_layernorm(attended)
            dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(residual)))
            flat = residual.flatten(0, -2)
            probability, weights, chosen = self.router(flat)  # reads the raw residual, the experts a normed one
        if chosen_Nk is not None:
            chosen, weights = chosen_Nk, weights_of(self.router, probability, chosen_Nk)
        n = call.counted
        load = expert_load(probability[:n], chosen[:n]) if n else flat.new_empty(0)
        sparse = self.experts(self.pre_feedforward_layernorm_2(flat), chosen, weights).view_as(residual)
        mixed = dense + self.post_feedforward_layernorm_2(sparse)
        hidden = residual + self.post_feedforward_layernorm(mixed)
        # ZeRO-3 leaves buffers in fp32
        scalar = torch.where(call.is_canvas_N1, self.layer_scalar, self.encoder_layer_scalar)
        return LayerOutput(hidden * scalar.to(hidden.dtype), load, chosen, left)


class DiffusionGemmaStack(nn.Module):
    """Embedding, layers, final norm and self-conditioning block; parameter names are transformers' below
    `model.decoder`. `sweep.Sweep` runs it.
    """

    def __init__(
        self,
        source: DiffusionGemmaForBlockDiffusion,
        activation_checkpointing: Checkpointing,
        image_rule: ImageRule,
        trains_vision_embedding: bool,
    ) -> None:
        super().__init__()
        outer: Any = source.model.encoder
        decoder, encoder = source.model.decoder, outer.language_model
        text = text_spec(source.config)
        self.config: DiffusionGemmaConfig = source.config
        inside = (*LANGUAGE, EMBEDDING) if trains_vision_embedding else LANGUAGE
        self.outside = {  # shapes of the checkpoint's other parameters, the vision tower's
            name: tuple(p.shape) for name, p in source.named_parameters() if not name.startswith(inside)
        }
        self.image_rule: ImageRule = image_rule
        self.vision = Vision(source.config, outer.vision_tower, None if trains_vision_embedding else outer.embed_vision)
        self.layer_types: tuple[str, ...] = tuple(text.layer_types)
        self.window: int = text.sliding_window
        self.activation_checkpointing: Checkpointing = activation_checkpointing
        self.dropout = PartDropout()
        self.has_dropout = False
        embedding = decoder.embed_tokens
        self.embed_tokens = TiedVocabulary(
            embedding, softcap=text.final_logit_softcapping, embed_scale=embedding.scalar_embed_scale
        )
        self.embed_vision = outer.embed_vision if trains_vision_embedding else None
        self.self_conditioning = decoder.self_conditioning
        self.layers = nn.ModuleList(
            SweepLayer(layer, twin, kind, self.dropout)
            for layer, twin, kind in zip(decoder.layers, encoder.layers, self.layer_types, strict=True)
        )
        self.norm = decoder.norm
        self.rotary_emb = decoder.rotary_emb

    def image_features(self, images: tuple[Tensor, Tensor] | None, like: Tensor) -> Tensor | None:
        """What stands in the place of image tokens, [K, H], of `pixel_values_IPD` and `position_IP2`; None: nothing.

        A projection that is trained is called without images too: under ZeRO-3 all ranks gather it, or none.
        """
        if images is None and self.embed_vision is None:
            return None
        soft = self.vision.soft_tokens(*images, like) if images else like.new_empty(0, self.vision.features)
        return soft if self.embed_vision is None else self.embed_vision(soft)

    def sweep_layers(self) -> Iterable[SweepLayer]:
        """The layers in order."""
        return cast(Iterable[SweepLayer], self.layers)
