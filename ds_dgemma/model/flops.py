"""Arithmetic of a training step, from the tokens that it reads: what `plan` foretells and `metrics.jsonl` divides by.

FLOPs are 2 per multiply-add, and only of matrix products. W are the weights of matrices that a token meets in a layer
(of experts its top k), W_trained those of them that get a gradient, P the visible pairs of query and key, V H the
vocabulary's matrix:

    forward of a layer   2 tokens W + 4 P heads head_size      clean tokens once, canvases once, first guesses once
    backward of a layer  2 tokens W + 2 tokens W_trained + 8 P heads head_size     from the first trained weight on
    scored token         6 V H: logits, the gradients of hidden state and matrix (frozen: 4)
    guessed token        4 V H: logits, soft embedding; 2 V H for the matrix's gradient (frozen: none)

An image of n soft tokens adds pairs among them, and the vision tower's forward, 2 patches W + 4 patches^2 heads
head_size, and its pooling and projection.

With a trained model that is the usual 6 W per token, and 2 W for a token of a first guess. This is *useful* work. What
is computed again is not: the forward of all layers but the last under activation checkpointing (`selective`: without
attention), a guess's logits in the backward pass; nor the guess that a micro-batch without any makes to stay in step.
Attention's own backward kernel computes its scores once more, which no checkpointing can spare: counted nowhere.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from operator import or_
from typing import Any

from ds_dgemma.model.parts import ImageRule, image_parts, visible
from ds_dgemma.model.spec import text_spec
from ds_dgemma.model.stack import DiffusionGemmaStack
from ds_dgemma.model.sweep import Checkpointing
from ds_dgemma.model.vision import Tower

VOCABULARY, BLOCK, LAYERS = "embed_tokens", "self_conditioning", "layers."


@dataclass(frozen=True)
class Layer:
    """The products of a layer, or of the self-conditioning block."""

    weights: int  # met by a token
    trained: int  # of these, with a gradient
    goes_back: bool  # whether the backward pass comes here: it, or something before it, is trained
    attention: int = 0  # heads * head size
    window: int | None = None

    def forward(self, tokens: float, pairs: float) -> float:
        """FLOPs of `tokens` with `pairs` visible pairs."""
        return 2 * tokens * self.weights + 4 * pairs * self.attention

    def backward(self, tokens: float, pairs: float) -> float:
        """FLOPs of their gradients, and of the weights'."""
        return self.goes_back * (2 * tokens * (self.weights + self.trained) + 8 * pairs * self.attention)

    def again(self, tokens: float, pairs: float, checkpointing: Checkpointing) -> float:
        """FLOPs of what the backward pass recomputes."""
        if checkpointing == "none" or not self.goes_back:
            return 0.0
        return self.forward(tokens, pairs if checkpointing == "full" else 0)


@dataclass(frozen=True)
class Products:
    """All of a model's."""

    layers: tuple[Layer, ...]
    block: Layer
    vocabulary: int  # V H
    trains_vocabulary: bool
    canvas_length: int
    goes_back: dict[str, bool]  # by unit, see `unit_of`
    tower: Tower
    projects: int  # weights of what projects an image's soft token
    image_rule: ImageRule


@dataclass(frozen=True)
class Work:
    """FLOPs."""

    useful: float
    again: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.useful + other.useful, self.again + other.again)

    def __mul__(self, times: float) -> "Work":
        return Work(self.useful * times, self.again * times)

    @property
    def wasted(self) -> "Work":
        """The same, of no use."""
        return Work(0.0, self.useful + self.again)


def unit_of(name: str) -> str:
    """What a parameter is gathered with: `layers.3.mlp.up_proj.weight` -> `layers.3`."""
    parts = name.split(".")
    return ".".join(parts[:2]) if name.startswith(LAYERS) else parts[0]


def products_of(stack: DiffusionGemmaStack) -> Products:
    """Read a stack's products off its parameters, wherever they are and however they are shared."""
    text = text_spec(stack.config)
    units: dict[str, list[tuple[int, bool]]] = {}  # weights met by a token and whether they are trained
    for name, parameter in stack.named_parameters():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves nothing of the other
        met = 0 if len(shape) < 2 else prod(shape)
        if len(shape) == 3:  # a rank's experts
            met = text.top_k_experts * prod(shape[1:])
        units.setdefault(unit_of(name), []).append((met, parameter.requires_grad))
    trains = (any(trained for _, trained in members) for members in units.values())
    goes_back = dict(zip(units, accumulate(trains, or_), strict=True))  # in the order of the forward pass

    def layer(unit: str, **more: Any) -> Layer:
        weights = sum(met for met, _ in units[unit])
        return Layer(weights, sum(met for met, is_trained in units[unit] if is_trained), goes_back[unit], **more)

    canvas_length = stack.config.canvas_length
    assert isinstance(canvas_length, int)
    return Products(
        layers=tuple(
            layer(
                f"{LAYERS}{i}",
                attention=text.num_attention_heads * text.per_layer_config[i].head_dim,
                window=stack.window if kind == "sliding_attention" else None,
            )
            for i, kind in enumerate(stack.layer_types)
        ),
        block=layer(BLOCK),
        vocabulary=units[VOCABULARY][0][0],
        trains_vocabulary=units[VOCABULARY][0][1],
        canvas_length=canvas_length,
        goes_back=goes_back,
        tower=stack.vision.products,
        projects=stack.vision.features * text.hidden_size,
        image_rule=stack.image_rule,
    )


def clean_pairs(tokens: int, window: int | None) -> int:
    """Visible pairs among the clean tokens of a document."""
    inside = tokens if window is None else min(tokens, window)
    return inside * (inside + 1) // 2 + (tokens - inside) * inside


def image_pairs(tokens: int, window: int | None, rule: ImageRule) -> int:
    """Visible pairs of an image's soft tokens beside those of any clean tokens."""
    return sum(
        (length := piece.queries[1] - piece.queries[0]) * (length + 1) // 2
        for piece in image_parts(0, tokens, window, rule)
    )


def image_work(products: Products, tokens: int) -> float:
    """The tower's forward for an image of so many soft tokens, and what its tokens see of each other."""
    pairs = ((layer, image_pairs(tokens, layer.window, products.image_rule)) for layer in products.layers)
    seen = sum(layer.forward(0, count) + layer.backward(0, count) for layer, count in pairs)
    return products.tower.flops(tokens) + 2 * tokens * products.projects + seen


def canvas_pairs(start: int, length: int, window: int | None) -> int:
    """Visible pairs of a canvas's queries."""
    begin, end = visible(start, window)
    return length * (end - begin + length)


def example_work(products: Products, clean: int, starts: Sequence[int], checkpointing: Checkpointing) -> Work:
    """Reading `clean` tokens and denoising canvases: forward, losses and backward, first guesses left out."""
    canvas = len(starts) * products.canvas_length
    useful, again = forward_flops(products, clean, starts), 0.0
    for number, layer in enumerate(products.layers):
        pairs = _pairs(products, layer, clean, starts)
        useful += layer.backward(clean + canvas, pairs)
        if number < len(products.layers) - 1:  # the last one is kept
            again += layer.again(clean + canvas, pairs, checkpointing)
    useful += products.block.backward(canvas, 0)
    useful += (6 if products.trains_vocabulary else 4) * products.vocabulary * (canvas + max(0, clean - 1))
    return Work(useful, again)


def guess_work(products: Products, start: int) -> Work:
    """One first guess: layers and logits, its soft embedding, and what that gives the matrix's gradient."""
    forward, logits = guess_forward_flops(products, start), 2 * products.vocabulary * products.canvas_length
    return Work(forward + logits, logits) if products.trains_vocabulary else Work(forward, 0.0)


def forward_flops(products: Products, clean: int, starts: Sequence[int]) -> float:
    """Clean tokens and canvases through the layers once."""
    canvas = len(starts) * products.canvas_length
    return products.block.forward(canvas, 0) + sum(
        layer.forward(clean + canvas, _pairs(products, layer, clean, starts)) for layer in products.layers
    )


def guess_forward_flops(products: Products, start: int) -> float:
    """A first guess and its soft embedding, no more."""
    return forward_flops(products, 0, [start]) + 4 * products.vocabulary * products.canvas_length


def batch_work(
    products: Products, documents: Iterable[tuple[int, Sequence[int], Sequence[int]]], images: Iterable[int] = ()
) -> float:
    """Useful FLOPs of documents of (clean tokens, starts of canvases, starts of those whose first guess counts), and of
    images of so many soft tokens.
    """
    return sum(image_work(products, tokens) for tokens in images) + sum(
        example_work(products, clean, starts, "none").useful + sum(guess_work(products, at).useful for at in guessed)
        for clean, starts, guessed in documents
    )


def _pairs(products: Products, layer: Layer, clean: int, starts: Sequence[int]) -> int:
    length = products.canvas_length
    return clean_pairs(clean, layer.window) + sum(canvas_pairs(start, length, layer.window) for start in starts)
