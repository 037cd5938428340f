"""Images to the soft tokens that stand for them in a document: transformers' vision tower, frozen, beside the stack.

The tower is no submodule of the stack. DeepSpeed neither shares nor gathers it, so a rank runs it when its micro-batch
has images, and no other waits for it. It is read when the first image comes: text-only runs never have it.

What projects its output to the model's hidden size, `embed_vision`, is frozen with it; or it is trained
(`model.train_vision_embedding`) and then a module of the stack, which every rank calls in every micro-batch.

Shapes: I images, P patches with D numbers each, K soft tokens of all images, F features of the tower, H hidden.
Source: transformers `DiffusionGemmaEncoderModel.get_image_features`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, DiffusionGemmaConfig

TOWER, EMBEDDING = "model.encoder.vision_tower.", "model.encoder.embed_vision."
AT_ONCE = 8  # images: what the tower holds for a moment grows with them

# (name in the checkpoint, tensor to fill) -> whether the checkpoint has it
Read = Callable[[str, Tensor], bool]


@dataclass(frozen=True)
class Tower:
    """The products of a tower, and its sizes."""

    weights: int  # met by a patch
    attention: int  # heads * head size, of all layers
    features: int
    intermediate: int
    pooled: int  # patches of a soft token

    def flops(self, soft_tokens: int) -> int:
        """FLOPs of an image without padding: its patches, all pairs of them, and what pools them."""
        patches = soft_tokens * self.pooled
        return 2 * patches * (self.weights + self.features * soft_tokens) + 4 * patches**2 * self.attention

    def bytes(self, soft_tokens: int, element: int) -> int:
        """What an image holds for a moment: a layer's tensors and the mask of its padding."""
        patches = soft_tokens * self.pooled
        return element * patches * (8 * self.features + 3 * self.intermediate + patches)


class Vision:
    """The tower, and the projection unless that is trained, on whatever device and in whatever type is asked for."""

    def __init__(self, config: DiffusionGemmaConfig, tower: nn.Module, embedding: nn.Module | None) -> None:
        """Modules on meta."""
        self._config: Any = config.vision_config
        self._parts = {TOWER: tower} if embedding is None else {TOWER: tower, EMBEDDING: embedding}
        self.features: int = self._config.hidden_size  # F
        self.read: Read | None = None  # how values are had; set by who opens the checkpoint
        self._is_open = False

    @property
    def products(self) -> Tower:
        """Its matrix products."""
        config, linears = self._config, [m for m in self._parts[TOWER].modules() if isinstance(m, nn.Linear)]
        return Tower(
            weights=sum(linear.in_features * linear.out_features for linear in linears),
            attention=config.num_attention_heads * config.head_dim * config.num_hidden_layers,
            features=self.features,
            intermediate=config.intermediate_size,
            pooled=config.pooling_kernel_size**2,
        )

    @torch.no_grad()
    def soft_tokens(self, pixel_values_IPD: Tensor, position_IP2: Tensor, like: Tensor) -> Tensor:
        """The images' soft tokens in reading order, in the type and on the device of `like`: [K, H], or [K, F] where
        the projection is trained.
        """
        if not self._is_open:
            self.open(like.device, like.dtype)
        found = []
        for first in range(0, len(pixel_values_IPD), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            pixels, position = pixel_values_IPD[part].to(like), position_IP2[part].to(like.device)
            hidden = self._parts[TOWER](pixels, pixel_position_ids=position).last_hidden_state
            found.append(self._parts[EMBEDDING](hidden) if EMBEDDING in self._parts else hidden)
        return torch.cat(found)

    def open(self, device: torch.device, dtype: torch.dtype) -> None:
        """Read the weights."""
        assert self.read
        for prefix, module in self._parts.items():
            if prefix == TOWER:
                self._make_computed(module)
            for owner_name, owner in module.named_modules():
                begin = f"{prefix}{owner_name}." if owner_name else prefix
                for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
                    if tensor.is_meta:
                        real = torch.empty(tensor.shape, dtype=dtype, device=device)
                        if not self.read(begin + name, real):
                            real.copy_(self._default(begin + name))
                        is_parameter = isinstance(tensor, nn.Parameter)
                        setattr(owner, name, nn.Parameter(real, requires_grad=False) if is_parameter else real)
            module.to(device).eval()
        self._is_open = True

    def _make_computed(self, tower: Any) -> None:
        """Rotary frequencies are computed, not stored."""
        tower.encoder.rotary_emb = type(tower.encoder.rotary_emb)(self._config)

    def _default(self, name: str) -> Tensor:
        """What transformers gives a buffer that a checkpoint need not have, such as a bound of infinity."""
        return AutoModel.from_config(self._config).get_buffer(name.removeprefix(TOWER))
