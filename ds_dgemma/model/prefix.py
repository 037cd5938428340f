"""Documents that grow while they are answered: read once, with canvases denoised against what is kept of them.

Every layer keeps the keys and values of all clean tokens, `[room of all documents, g, d]`, in one buffer that is made
at the first reading. Clean tokens go behind what a document has; a canvas sees those before its start, as in training
(`sweep.py`), and its own stand behind them until the next call. Nothing here has a gradient; rounding is transformers'
wherever the operations are.

Under ZeRO-3 and expert parallelism every call is a collective: all ranks make the same calls, in the same order.
Shapes: R documents or canvases of a call, L canvas tokens, N tokens of a call, H hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, chain

import torch
from torch import Tensor

from ds_dgemma.model.norm import literal_norms
from ds_dgemma.model.parts import Cache, Image, Tokens
from ds_dgemma.model.stack import DiffusionGemmaStack, SweepLayer
from ds_dgemma.model.sweep import Call
from ds_dgemma.model.vocabulary import WeightGradient


class Prefix:
    """Documents with room for what is generated."""

    def __init__(
        self, stack: DiffusionGemmaStack, rooms: Sequence[int], device: torch.device, padding: Sequence[int] = ()
    ) -> None:
        """`padding`: the first tokens of each document that nothing sees; on a CPU only."""
        self._stack, self._rooms, self._device, self._padding = stack, tuple(rooms), device, tuple(padding)
        self._cache: list[list[Tensor]] = [[] for _ in stack.layer_types]  # keys and values
        self.lengths = [0] * len(rooms)  # clean tokens of each document so far

    @torch.no_grad()
    @literal_norms()
    def read(
        self,
        documents: Sequence[int],
        tokens: Sequence[Sequence[int]],
        images: Sequence[tuple[int, int, int]] = (),
        pixels: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Read tokens behind what `documents`, in order, have. `images`: the document, the first and the end of the
        tokens of each, with `pixels` for `DiffusionGemmaStack.image_features`.
        """
        ids = torch.tensor(list(chain.from_iterable(tokens)), device=self._device)
        new = dict(zip(documents, map(len, tokens), strict=True))
        self._through(new, ids, None, False, tuple(Image(*image) for image in images), pixels)
        for number, new in zip(documents, tokens, strict=True):
            self.lengths[number] += len(new)

    @torch.no_grad()
    @literal_norms()
    def denoise(self, documents: Sequence[int], ids_RL: Tensor, soft_RLH: Tensor | None) -> Tensor:
        """The canvases behind `documents`, in order: normed hidden states [R * L, H]. `soft_RLH`: what conditions
        them.
        """
        soft_NH = None if soft_RLH is None else soft_RLH.flatten(0, 1)
        hidden = self._through(dict.fromkeys(documents, ids_RL.shape[1]), ids_RL.flatten(), soft_NH, is_canvas=True)
        return self._stack.norm(hidden)

    def _through(
        self,
        new: dict[int, int],
        ids_N: Tensor,
        soft_NH: Tensor | None,
        is_canvas: bool,
        images: tuple[Image, ...] = (),
        pixels: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """All layers over `new` tokens behind each document; hidden states [N, H]."""
        stack = self._stack
        counts = tuple(new.get(number, 0) for number in range(len(self._rooms)))
        hidden, _ = stack.embed_tokens.embed(ids_N, None, 1, WeightGradient())
        if not is_canvas and (features := stack.image_features(pixels, hidden)) is not None:
            hidden = hidden.index_copy(0, self._places(counts, images), features.to(hidden.dtype))
        if is_canvas:
            hidden = stack.self_conditioning(hidden, torch.zeros_like(hidden) if soft_NH is None else soft_NH)
        places = [range(before, before + count) for before, count in zip(self.lengths, counts, strict=True)]
        position_1N = torch.tensor([list(chain.from_iterable(places))], device=self._device)
        cache = Cache(self._rooms, tuple(self.lengths), is_canvas, self._padding)
        call = Call(
            tokens=Tokens(counts, (), 0, cache=cache, images=images, image_rule=stack.image_rule),
            rotary={kind: stack.rotary_emb(hidden, position_1N, kind) for kind in set(stack.layer_types)},
            is_canvas_N1=torch.full((len(ids_N), 1), is_canvas, device=self._device),
            counted=0,
            dropout=None,
        )
        hidden = hidden[None]
        # of clean tokens only keys and values are read, so the last layer makes nothing else of them
        last = replace(call, tokens=replace(call.tokens, cache=cache._replace(keys_only=not is_canvas)))
        layers = list(stack.sweep_layers())
        for number, (layer, kept) in enumerate(zip(layers, self._cache, strict=True), start=1):
            (hidden,) = layer(hidden, job=partial(_block, layer, last if number == len(layers) else call, kept))
        return hidden[0]

    def _places(self, counts: tuple[int, ...], images: tuple[Image, ...]) -> Tensor:
        """Where the tokens of images are in a call."""
        first = list(accumulate(counts, initial=0))
        shifts = [first[image.document] - self.lengths[image.document] for image in images]
        places = [range(image.begin + s, image.end + s) for image, s in zip(images, shifts, strict=True)]
        return torch.tensor(list(chain.from_iterable(places)), dtype=torch.int64, device=self._device)


def _block(layer: SweepLayer, call: Call, kept: list[Tensor], hidden_1NH: Tensor) -> tuple[Tensor]:
    return (layer.block(hidden_1NH, call, kept=kept).hidden_1NH,)
