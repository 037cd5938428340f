"""The training objective: corrupt (done in the batch), sweep, self-condition, sweep, two-part loss. One forward,
loss included.

    loss = sum over supervised canvas tokens of nll * diffusion_weight + sum over clean pairs of nll * ar_weight

A canvas token's nll is what `objective/losses.py` makes of it by its canvas's noise level. The weights carry the global
means: `world * accumulation / tokens of the global batch` (times `encoder_loss_weight`), because DeepSpeed averages
gradients over ranks and accumulation steps. So every token counts the same, wherever it was computed. With a
`RouterBalance` the routers' load-balance loss (`model/routing.py`) is added.

This is the module that DeepSpeed wraps; it knows the model and nothing of ranks. Shapes: as in `data/batch.py`, H
hidden. Source: DiffusionGemma's recipe, gemma/diffusion `hackable_diffusion_adapter/hd/sft_model.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ds_dgemma.config import LossName
from ds_dgemma.data.batch import Batch
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
        cls, diffusion_tokens: int, ar_tokens: int, encoder_loss_weight: float, shares: int
    ) -> "TokenWeights":
        """Weights whose sum over the global batch is a mean; `shares` = ranks * accumulation. No token, no weight."""
        return cls(
            diffusion=shares / diffusion_tokens if diffusion_tokens else 0.0,
            ar=encoder_loss_weight * shares / ar_tokens if ar_tokens else 0.0,
        )


@dataclass(frozen=True)
class RouterBalance:
    """How the routers' load-balance loss enters."""

    weight: float  # of the whole batch's loss, times ranks * accumulation
    # The counts [L, E] of tokens that chose an expert, of this micro-batch -> of the whole optimizer batch
    whole_batch: Callable[[Tensor], Tensor]


class LossParts(NamedTuple):
    """The loss to differentiate, and what is behind it, detached."""

    loss: Tensor
    diffusion_nll: Tensor  # sum over supervised canvas tokens, of what is minimised: by the loss's weights and shifts
    ar_nll: Tensor  # sum over clean pairs
    router: Tensor  # this micro-batch's part of the load-balance loss, without its weight; zero when it is off


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
        loads = None if balance is None else ExpertLoads(batch.is_real_N)
        clean_BSH, canvas_BKLH = self.hidden_states(batch, gradient, loads)

        router = clean_BSH.new_zeros((), dtype=torch.float32)
        if balance is not None and loads is not None:
            top_k = text_spec(self.model.config).top_k_experts
            router = balance_loss(loads.probability_LE(), balance.whole_batch(loads.tokens_LE()), top_k)
        if weights is None:
            nothing = router.new_zeros(())
            return LossParts(router, nothing, nothing, router.detach())

        pairs = batch.ar_pairs_BS
        hidden = torch.cat([canvas_BKLH.flatten(0, 2), clean_BSH[:, :-1].flatten(0, 1)])
        target = torch.cat([batch.target_ids_BKL.flatten(), batch.clean_ids_BS[:, 1:].flatten()])
        is_scored = torch.cat([batch.supervised_BKL.flatten(), pairs.flatten()])
        canvas_tokens = batch.supervised_BKL.numel()
        level = batch.noise_level_BK[..., None].expand_as(batch.supervised_BKL).flatten()
        counts = is_scored.float()
        counts[:canvas_tokens] *= self.loss.weight(level)
        token_weight = torch.full_like(counts, weights.ar)
        token_weight[:canvas_tokens] = weights.diffusion
        shift = None
        if self.loss.shift is not None:
            amount = torch.zeros_like(counts)
            amount[:canvas_tokens] = self.loss.shift(level, self.vocab_size)
            shift = Shift(torch.cat([batch.canvas_ids_BKL.flatten(), target[canvas_tokens:]]), amount)
        loss, nll = self.model.embed_tokens.score(hidden, target, token_weight * counts, self.chunk, gradient, shift)
        nll = nll * counts
        if balance is not None:
            loss = loss + balance.weight * router
        return LossParts(loss, nll[:canvas_tokens].sum(), nll[canvas_tokens:].sum(), router.detach())

    def hidden_states(
        self, batch: Batch, gradient: WeightGradient, loads: ExpertLoads | None = None
    ) -> tuple[Tensor, Tensor]:
        """Final hidden states, clean [B, S, H] and canvas [B, K, L, H]: both passes of self-conditioning; fills
        `loads`.
        """
        (B, S), (_, K, L) = batch.clean_ids_BS.shape, batch.canvas_ids_BKL.shape
        n, block = B * S, self.model.self_conditioning
        canvas_ids = batch.canvas_ids_BKL.flatten(0, 1)
        places = Places(S, L, batch.starts, batch.canvas_start_BK, batch.guessed, batch.guessed_M)
        with torch.no_grad():
            ids = torch.cat([batch.clean_ids_BS.flatten(), canvas_ids[batch.guessed_M].flatten()])
            inputs, _ = self.model.embed_tokens.embed(ids, None, self.chunk, WeightGradient())
            clean, guess = inputs[:n], inputs[n:]
            guess = block(guess, torch.zeros_like(guess))
        sweep = Sweep(self.model, places, inputs, loads)
        guess = sweep.read(clean, guess, differentiates=torch.is_grad_enabled())

        ids = torch.cat([batch.clean_ids_BS.flatten(), canvas_ids.flatten()])
        inputs, soft = self.model.embed_tokens.embed(ids, guess, self.chunk, gradient)
        canvas = inputs[n:]
        # An unconditioned canvas gets zeros, not the mean embedding; the block still runs on them.
        soft = soft.view(len(batch.guessed), L, canvas.shape[-1]) * batch.coin_M[:, None, None].to(soft.dtype)
        soft = canvas.new_zeros(B * K, *soft.shape[1:]).index_copy(0, batch.guessed_M, soft)
        canvas = block(with_gradient(canvas, block), soft.flatten(0, 1))
        clean, canvas = sweep.denoise(inputs[:n], canvas)
        return clean.view(B, S, -1), canvas.view(B, K, L, -1)
