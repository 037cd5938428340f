"""Who sees whom in one sweep over `[clean | canvases]`.

The encoder (causal, clean tokens) and the decoder (bidirectional, canvas tokens) share their weights, and a canvas
token reads the same layer's clean keys. So both modes fit in one sequence, and one mask tells them apart:

- clean -> clean: causal, and on sliding layers within the window (itself included), in the same document; and inside
  an image by one of two rules. generate: all of it, on every layer. sliding: on sliding layers what lies behind, too;
- canvas -> clean: what lies before its canvas's start; on sliding layers only the last `window - 1` of those, the
  same for every token of the canvas;
- canvas -> canvas: all of the same canvas, even when it is longer than the window. Nothing else reads a canvas.

Shapes: T tokens, clean ones and canvases. Sources: transformers `modeling_diffusion_gemma.py`
(`create_diffusion_decoder_attention_mask`, sliding cache) and gemma/diffusion
`hackable_diffusion_adapter/hd/mask_helpers.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

CLEAN = NO_IMAGE = -1


@dataclass(frozen=True)
class TokenLayout:
    """What every token of a sweep is."""

    position_T: torch.Tensor  # int64, position id: a canvas token's is its canvas's start plus its offset
    document_T: torch.Tensor  # int64
    canvas_T: torch.Tensor  # int64, number of the token's canvas, CLEAN for clean tokens
    start_T: torch.Tensor  # int64, position where the token's canvas begins; unused for clean tokens
    image_T: torch.Tensor | None = None  # int64, number of the token's image, NO_IMAGE for others

    @property
    def is_canvas_T(self) -> torch.Tensor:
        """Bool [T]: denoised by the decoder, rather than read by the encoder."""
        return self.canvas_T != CLEAN


def clean_and_canvases(
    documents: Sequence[int],
    canvases: Sequence[tuple[int, int]],
    length: int,
    images: Sequence[tuple[int, int, int]] = (),
) -> TokenLayout:
    """Lay out documents of so many clean tokens, then canvases of `length`, each of a document and a start; `images`
    are of a document, from a token to another.
    """
    tokens = [(position, number, CLEAN, 0) for number, clean in enumerate(documents) for position in range(clean)]
    tokens += [
        (start + offset, document, number, start)
        for number, (document, start) in enumerate(canvases)
        for offset in range(length)
    ]
    of_token = {(image[0], place): n for n, image in enumerate(images) for place in range(*image[1:])}
    numbers = [of_token.get((d, p), NO_IMAGE) if canvas == CLEAN else NO_IMAGE for p, d, canvas, _ in tokens]
    return TokenLayout(*torch.tensor(tokens).T, torch.tensor(numbers))


def attention_masks(layout: TokenLayout, window: int, rule: str = "generate") -> dict[str, torch.Tensor]:
    """Bool masks [T, T] (query, key; True sees), by transformers' layer type.

    Three clean tokens a b c and a canvas x y that starts at position 2 (so it may not read c, its own clean text),
    window 2:

              full_attention        sliding_attention
              a b c x y             a b c x y
        a     1 . . . .             1 . . . .
        b     1 1 . . .             1 1 . . .
        c     1 1 1 . .             . 1 1 . .
        x     1 1 . 1 1             . 1 . 1 1
        y     1 1 . 1 1             . 1 . 1 1
    """
    query, key = (lambda t: t[:, None]), (lambda t: t[None, :])
    position, start, canvas = layout.position_T, layout.start_T, layout.canvas_T
    same_document = query(layout.document_T) == key(layout.document_T)
    from_canvas, to_canvas = query(layout.is_canvas_T), key(layout.is_canvas_T)
    same_canvas = to_canvas & (query(canvas) == key(canvas))

    causal = key(position) <= query(position)
    before_canvas = key(position) < query(start)
    full = torch.where(from_canvas, same_canvas | (before_canvas & ~to_canvas), causal & ~to_canvas) & same_document
    in_window = torch.where(
        from_canvas,
        same_canvas | (key(position) > query(start) - window),
        key(position) > query(position) - window,
    )
    sliding = full & in_window
    if layout.image_T is not None:
        image = layout.image_T
        same_image = (query(image) == key(image)) & (key(image) != NO_IMAGE)
        if rule == "generate":
            return {"full_attention": full | same_image, "sliding_attention": sliding | same_image}
        sliding |= same_image & (key(position) > query(position))
    return {"full_attention": full, "sliding_attention": sliding}
