"""The training objective: corrupt (done in the batch), sweep, self-condition, sweep, two-part loss. One forward,
loss included.

    loss = sum over supervised canvas tokens of nll * diffusion_weight + sum over clean pairs of nll * ar_weight

The weights carry the global means: `world * accumulation / tokens of the global batch` (times
`encoder_loss_weight`), because DeepSpeed averages gradients over ranks and accumulation steps. So every token
counts the same, wherever it was computed. With a `RouterBalance` the routers' load-balance loss (`model/routing.py`)
is added.

This is the module that DeepSpeed wraps; it knows the model and nothing of ranks. Shapes: as in `data/batch.py`, H
hidden. Source: DiffusionGemma's recipe, gemma/diffusion `hackable_diffusion_adapter/hd/sft_model.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ds_dgemma.data.batch import Batch
from ds_dgemma.model.masks import clean_and_canvases
from ds_dgemma.model.routing import ExpertLoads, balance_loss
from ds_dgemma.model.spec import text_spec
from ds_dgemma.model.stack import DiffusionGemmaStack, with_gradient
from ds_dgemma.model.vocabulary import WeightGradient


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
    diffusion_nll: Tensor  # sum over supervised canvas tokens
    ar_nll: Tensor  # sum over clean pairs
    router: Tensor  # this micro-batch's part of the load-balance loss, without its weight; zero when it is off


class DenoisingObjective(nn.Module):
    """DiffusionGemma with its loss."""

    def __init__(self, model: DiffusionGemmaStack, logits_chunk_mib: int) -> None:
        super().__init__()
        self.model = model
        self.chunk = max(1, logits_chunk_mib * 2**20 // (4 * text_spec(model.config).vocab_size))

    def forward(self, batch: Batch, weights: TokenWeights | None, balance: RouterBalance | None = None) -> LossParts:
        """Return the loss; without weights no more than the routers' part of it."""
        gradient = WeightGradient()
        loads = None if balance is None else ExpertLoads(batch.is_real_BT)
        first_pass_MH = self.first_pass(batch)
        clean_BSH, canvas_BKLH = self.second_pass(batch, first_pass_MH, gradient, loads)

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
        token_weight = torch.full(target.shape, weights.ar, dtype=torch.float32, device=target.device)
        token_weight[:canvas_tokens] = weights.diffusion
        loss, nll = self.model.embed_tokens.score(hidden, target, token_weight * is_scored, self.chunk, gradient)
        nll = nll * is_scored
        if balance is not None:
            loss = loss + balance.weight * router
        return LossParts(loss, nll[:canvas_tokens].sum(), nll[canvas_tokens:].sum(), router.detach())

    @torch.no_grad()
    def first_pass(self, batch: Batch) -> Tensor:
        """Hidden states [R * K * L, H] of the first guess, on the rows whose coin needs one, reading no more than
        their prefix.
        """
        rows, prefix = (
            torch.tensor(batch.first_pass.rows, device=batch.clean_ids_BS.device),
            batch.first_pass.prefix,
        )
        ids, canvas_ids = batch.clean_ids_BS[rows, :prefix], batch.canvas_ids_BKL[rows]
        L = canvas_ids.shape[-1]
        inputs, _ = self._embed(ids, canvas_ids, None, WeightGradient())
        clean, canvas = inputs[:, :prefix], inputs[:, prefix:]
        canvas = self.model.self_conditioning(canvas, torch.zeros_like(canvas))
        layout = clean_and_canvases(batch.clean_valid_BS[rows, :prefix], batch.canvas_start_BK[rows], L)
        hidden = self.model(torch.cat([clean, canvas], dim=1), layout)
        return hidden[:, prefix:].reshape(-1, self._hidden_size)

    def second_pass(
        self, batch: Batch, first_pass_MH: Tensor, gradient: WeightGradient, loads: ExpertLoads | None = None
    ) -> tuple[Tensor, Tensor]:
        """The sweep that is differentiated: clean [B, S, H] and canvas [B, K, L, H] hidden states; fills `loads`."""
        S, (B, K, L) = batch.clean_ids_BS.shape[1], batch.canvas_ids_BKL.shape
        inputs, soft_MH = self._embed(batch.clean_ids_BS, batch.canvas_ids_BKL, first_pass_MH, gradient)
        clean, canvas = inputs[:, :S], inputs[:, S:]
        rows = torch.tensor(batch.first_pass.rows, device=canvas.device)
        # An unconditioned canvas gets zeros, not the mean embedding; the block still runs on them.
        coin = batch.self_condition_BK[rows].repeat_interleave(L, dim=1).unsqueeze(-1)
        soft = soft_MH.view(len(rows), K * L, self._hidden_size) * coin.to(soft_MH.dtype)
        soft = torch.zeros_like(canvas).index_copy(0, rows, soft)
        block = self.model.self_conditioning
        canvas = block(with_gradient(canvas, block), soft)
        layout = clean_and_canvases(batch.clean_valid_BS, batch.canvas_start_BK, L)
        hidden = self.model(torch.cat([clean, canvas], dim=1), layout, loads)
        return hidden[:, :S], hidden[:, S:].view(B, K, L, self._hidden_size)

    @property
    def _hidden_size(self) -> int:
        return text_spec(self.model.config).hidden_size

    def _embed(
        self, clean_ids: Tensor, canvas_ids_BKL: Tensor, first_pass_MH: Tensor | None, gradient: WeightGradient
    ) -> tuple[Tensor, Tensor]:
        ids = torch.cat([clean_ids, canvas_ids_BKL.flatten(1)], dim=1)
        return self.model.embed_tokens.embed(ids, first_pass_MH, self.chunk, gradient)
