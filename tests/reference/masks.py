"""Who sees whom in one sweep over `[clean | canvases]`.

The encoder (causal, clean tokens) and the decoder (bidirectional, canvas tokens) share their weights, and a canvas
token reads the same layer's clean keys. So both modes fit in one sequence, and one mask tells them apart:

- clean -> clean: causal, and on sliding layers within the window (itself included), in the same document;
- canvas -> clean: what lies before its canvas's start; on sliding layers only the last `window - 1` of those, the
  same for every token of the canvas;
- canvas -> canvas: all of the same canvas, even when it is longer than the window. Nothing else reads a canvas.

Shapes: B rows, T tokens of a row (clean tokens and canvases). Sources: transformers `modeling_diffusion_gemma.py`
(`create_diffusion_decoder_attention_mask`, sliding cache) and gemma/diffusion
`hackable_diffusion_adapter/hd/mask_helpers.py`.
"""

from dataclasses import dataclass

import torch

PADDING = -1
CLEAN = -1


@dataclass(frozen=True)
class TokenLayout:
    """What every token of a sweep is."""

    position_BT: torch.Tensor  # int64, position id: a canvas token's is its canvas's start plus its offset
    document_BT: torch.Tensor  # int64, PADDING for tokens that nobody may see
    canvas_BT: torch.Tensor  # int64, number of the token's canvas in its row, CLEAN for clean tokens
    start_BT: torch.Tensor  # int64, position where the token's canvas begins; unused for clean tokens

    @property
    def is_canvas_BT(self) -> torch.Tensor:
        """Bool [B, T]: denoised by the decoder, rather than read by the encoder."""
        return self.canvas_BT != CLEAN


def clean_and_canvases(clean_valid_BS: torch.Tensor, canvas_start_BK: torch.Tensor, length: int) -> TokenLayout:
    """Lay out one document per row: S clean tokens, then K canvases of `length` tokens."""
    (B, S), K = clean_valid_BS.shape, canvas_start_BK.shape[1]
    device = clean_valid_BS.device
    clean_position = torch.arange(S, device=device).expand(B, S)
    canvas_start = canvas_start_BK.repeat_interleave(length, dim=1)
    offset = torch.arange(length, device=device).repeat(K)
    number = torch.arange(K, device=device).repeat_interleave(length).expand(B, K * length)
    document = torch.where(clean_valid_BS, 0, PADDING)
    return TokenLayout(
        position_BT=torch.cat([clean_position, canvas_start + offset], dim=1),
        document_BT=torch.cat([document, torch.zeros_like(canvas_start)], dim=1),
        canvas_BT=torch.cat([torch.full_like(clean_position, CLEAN), number], dim=1),
        start_BT=torch.cat([torch.zeros_like(clean_position), canvas_start], dim=1),
    )


def attention_masks(layout: TokenLayout, window: int) -> dict[str, torch.Tensor]:
    """Bool masks [B, 1, T, T] (query, key; True sees), by transformers' layer type.

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
    query, key = (lambda t: t[:, :, None]), (lambda t: t[:, None, :])
    position, start, canvas = layout.position_BT, layout.start_BT, layout.canvas_BT
    same_document = (query(layout.document_BT) == key(layout.document_BT)) & (key(layout.document_BT) != PADDING)
    from_canvas, to_canvas = query(layout.is_canvas_BT), key(layout.is_canvas_BT)
    same_canvas = to_canvas & (query(canvas) == key(canvas))

    causal = key(position) <= query(position)
    before_canvas = key(position) < query(start)
    full = torch.where(from_canvas, same_canvas | (before_canvas & ~to_canvas), causal & ~to_canvas)
    in_window = torch.where(
        from_canvas,
        same_canvas | (key(position) > query(start) - window),
        key(position) > query(position) - window,
    )
    # A token that sees nothing has no softmax: padding sees itself.
    itself = torch.eye(position.shape[1], dtype=torch.bool, device=position.device)
    full = (full & same_document) | itself
    return {"full_attention": full[:, None], "sliding_attention": (full & in_window | itself)[:, None]}
