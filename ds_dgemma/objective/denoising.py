"""The training objective: corrupt (done in the batch), sweep, self-condition, sweep, two-part loss. One forward,
loss included.

    loss = diffusion_weight * sum over canvas tokens of w * nll + ar_weight * sum over clean tokens of w * nll

A canvas token's nll is what `objective/losses.py` makes of it by its canvas's noise level; w is the batch's weight of
the token, 1 as a rule. The other weights carry the global means: `world * accumulation / sum of w` over the global
batch (times `encoder_loss_weight`), because DeepSpeed averages gradients over ranks and accumulation steps. So every
token counts the same, wherever it was computed. With a `RouterBalance` the routers' load-balance loss
(`model/routing.py`) is added.

This is the module that DeepSpeed wraps; it knows the model and nothing of ranks. Shapes: as in `data/batch.py`, H
hidden. Source: DiffusionGemma's recipe, gemma/diffusion `hackable_diffusion_adapter/hd/sft_model.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ds_dgemma.config.run import LossName
from ds_dgemma.data.batch import Batch
from ds_dgemma.model.parts import Canvas, Image
from ds_dgemma.model.routing import ExpertLoads, balance_loss
from ds_dgemma.model.spec import text_spec
from ds_dgemma.model.stack import DiffusionGemmaStack
from ds_dgemma.model.sweep import Places, Sweep, with_gradient
from ds_dgemma.model.vocabulary import Shift, WeightGradient
from ds_dgemma.objective.losses import LOSSES


@dataclass(frozen=True)
class TokenWeights:
    """What one token's loss counts for in the optimizer step."""

    diffusion: float
    ar: float

    @classmethod
    def global_mean(
        cls, diffusion_tokens: float, ar_tokens: float, encoder_loss_weight: float, shares: int
    ) -> "TokenWeights":
        """Weights whose sum over the global batch is a mean; `shares` = ranks * accumulation. No token, no weight."""
        return cls(
            diffusion=shares / diffusion_tokens if diffusion_tokens else 0.0,
            ar=encoder_loss_weight * shares / ar_tokens if ar_tokens else 0.0,
        )


def mean(nll: float, tokens: float) -> float:
    """The mean of a sum over so many tokens, each by its weight; of nothing, 0."""
    return nll / tokens if tokens else 0.0


@dataclass(frozen=True)
class RouterBalance:
    """How the routers' load-balance loss enters."""

    weight: float  # of the whole batch's loss, times ranks * accumulation
    # The counts [L, E] of tokens that chose an expert, of this micro-batch -> of the whole optimizer batch
    whole_batch: Callable[[Tensor], Tensor]


class LossParts(NamedTuple):
    """The loss to differentiate, and what is behind it, detached."""

    loss: Tensor
    diffusion_nll: Tensor  # sum over canvas tokens, of what is minimised: by the loss's weights and shifts
    ar_nll: Tensor  # sum over clean tokens
    router: Tensor  # this micro-batch's part of the load-balance loss, without its weight; zero when it is off
    by_canvas_2C: Tensor  # of each canvas without gradients: its nll, and how many of its tokens are the likeliest


class DenoisingObjective(nn.Module):
    """DiffusionGemma with its loss."""

    def __init__(self, model: DiffusionGemmaStack, logits_chunk_mib: int, loss: LossName = "base") -> None:
        super().__init__()
        self.model = model
        self.loss = LOSSES[loss]
        self.vocab_size = text_spec(model.config).vocab_size
        self.chunk = max(1, logits_chunk_mib * 2**20 // (4 * self.vocab_size))

    def forward(self, batch: Batch, weights: TokenWeights | None, balance: RouterBalance | None = None) -> LossParts:
        """Return the loss; without weights no more than the routers' part of it."""
        gradient = WeightGradient()
        loads = None if balance is None else ExpertLoads()
        clean_SH, canvas_CLH = self.hidden_states(batch, gradient, loads)

        router = clean_SH.new_zeros((), dtype=torch.float32)
        if balance is not None and loads is not None:
            top_k = text_spec(self.model.config).top_k_experts
            router = balance_loss(loads.probability_LE(), balance.whole_batch(loads.tokens_LE()), top_k)
        if weights is None:
            nothing = router.new_zeros(())
            return LossParts(router, nothing, nothing, router.detach(), nothing.expand(2, 0))

        hidden = torch.cat([canvas_CLH.flatten(0, 1), clean_SH[batch.ar_place_A - 1]])
        target = torch.cat([batch.target_ids_CL.flatten(), batch.clean_ids_S[batch.ar_place_A]])
        canvas_tokens = batch.canvas_ids_CL.numel()
        level = batch.noise_level_C[:, None].expand_as(batch.canvas_ids_CL).flatten()
        counts = torch.cat([batch.canvas_weight_CL.flatten() * self.loss.weight(level), batch.ar_weight_A])
        token_weight = torch.full_like(counts, weights.ar)
        token_weight[:canvas_tokens] = weights.diffusion
        shift = None
        if self.loss.shift is not None:
            amount = torch.zeros_like(counts)
            amount[:canvas_tokens] = self.loss.shift(level, self.vocab_size)
            shift = Shift(torch.cat([batch.canvas_ids_CL.flatten(), target[canvas_tokens:]]), amount)
        loss, nll, is_top = self.model.embed_tokens.score(
            hidden, target, token_weight * counts, self.chunk, gradient, shift
        )
        nll = nll * counts
        of_canvases = nll.new_empty(2, 0)
        if len(is_top):
            pair = torch.stack([nll[:canvas_tokens], is_top[:canvas_tokens] * counts[:canvas_tokens]])
            of_canvases = pair.unflatten(1, (len(batch.canvases), -1)).sum(-1)
        if balance is not None:
            loss = loss + balance.weight * router
        return LossParts(loss, nll[:canvas_tokens].sum(), nll[canvas_tokens:].sum(), router.detach(), of_canvases)

    def hidden_states(
        self, batch: Batch, gradient: WeightGradient, loads: ExpertLoads | None = None
    ) -> tuple[Tensor, Tensor]:
        """Final hidden states, clean [S, H] and canvas [C, L, H]: both passes of self-conditioning; fills `loads`."""
        n, block = batch.clean_ids_S.numel(), self.model.self_conditioning
        canvases = tuple(Canvas(*place) for place in batch.canvases)
        places = Places(
            documents=batch.documents,
            canvases=canvases,
            length=batch.canvas_ids_CL.shape[1],
            position_S=batch.position_S,
            start_C=batch.canvas_start_C,
            guessed=batch.guessed,
            guessed_M=batch.guessed_M,
            images=tuple(Image(*block) for block in batch.pictures.blocks) if batch.pictures else (),
        )
        with torch.no_grad():
            ids = torch.cat([batch.clean_ids_S, batch.canvas_ids_CL[batch.guessed_M].flatten()])
            inputs, _ = self.model.embed_tokens.embed(ids, None, self.chunk, WeightGradient())
            clean, guess = inputs[:n], inputs[n:]
            guess = block(guess, torch.zeros_like(guess))
        place_images = self._images(batch, inputs)
        with torch.no_grad():
            clean = place_images(clean)
        sweep = Sweep(self.model, places, inputs, loads)
        guess = sweep.read(clean, guess, differentiates=torch.is_grad_enabled())

        ids = torch.cat([batch.clean_ids_S, batch.canvas_ids_CL.flatten()])
        inputs, soft = self.model.embed_tokens.embed(ids, guess, self.chunk, gradient)
        canvas = inputs[n:].unflatten(0, batch.canvas_ids_CL.shape)
        # An unconditioned canvas gets zeros, not the mean embedding; the block still runs on them.
        soft = soft.unflatten(0, (len(batch.guessed), -1)) * batch.coin_M[:, None, None].to(soft.dtype)
        soft = torch.zeros_like(canvas).index_copy(0, batch.guessed_M, soft)
        canvas = block(with_gradient(canvas, block).flatten(0, 1), soft.flatten(0, 1))
        clean, canvas = sweep.denoise(place_images(inputs[:n]), canvas)
        return clean, canvas.view(*batch.canvas_ids_CL.shape, -1)

    def _images(self, batch: Batch, like: Tensor) -> Callable[[Tensor], Tensor]:
        """What puts the images into clean tokens [S, H]."""
        pictures = batch.pictures
        pixels = None if pictures is None else (pictures.pixel_values_IPD, pictures.position_IP2)
        features_KH = self.model.image_features(pixels, like)
        if features_KH is None:
            return lambda clean_SH: clean_SH
        place_K = batch.clean_ids_S.new_empty(0) if pictures is None else pictures.place_K
        return lambda clean_SH: clean_SH.index_copy(0, place_K, features_KH.to(clean_SH.dtype))
