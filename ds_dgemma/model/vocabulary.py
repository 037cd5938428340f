"""The tied embedding in its three uses: look-up, soft embedding, and the two-part loss; logits never exist whole.

At real size a token's fp32 logits are 1 MiB and the matrix's fp32 gradient 2.9 GB. So logits are made in chunks of
tokens, their gradient in the same visit, and the matrix's gradient of all three uses is summed in one fp32 buffer:
`score` opens it, and the look-up, whose backward runs last because everything flows from it, adds its own share and
the soft embedding's and hands it over.

Shapes: N tokens, M canvas tokens, H hidden, V vocabulary. Numbers follow transformers
`DiffusionGemmaForBlockDiffusion.forward` and `DiffusionGemmaDecoderModel.forward`: logits are soft-capped in fp32,
probabilities are cast to the weight's type, only the first-pass logits are detached (the soft embedding's gradient
reaches the matrix), and the padding row gets no look-up gradient.
"""

import logging
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)

Take = Callable[[Tensor, Tensor], None]

WIDEST_CAP = 40.0  # exp(-2 * 40) is a normal number in fp32
CPU_CHUNK = 4 * 2**20  # bytes of fp32 logits


class WeightGradient:
    """The matrix's gradient [V, H] while a backward pass collects it; fp32, or wider if the weight is."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def open(self, weight: Tensor) -> Tensor:
        """Return the buffer, zeroed at the first call."""
        if self._sum is None:
            self._sum = torch.zeros(weight.shape, dtype=wide(weight.dtype), device=weight.device)
        return self._sum

    def scale(self, factor: Tensor) -> None:
        """Multiply what was collected so far."""
        if self._sum is not None:
            self._sum.mul_(factor)

    def take(self, weight: Tensor) -> Tensor:
        """Hand the sum over and forget it."""
        total, self._sum = self.open(weight), None
        return total


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type sums and logits are held in: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


class Shift(NamedTuple):
    """One logit of each row is raised before the softmax."""

    token_N: Tensor  # int64, whose
    amount_N: Tensor  # fp32, by how many nats


class TiedVocabulary(nn.Module):
    """Owns the embedding matrix, named as in transformers (`embed_tokens.weight`).

    Every use goes through `forward`, because under ZeRO-3 the matrix is whole only inside its owner's forward and
    backward. To read so much as its type from outside would keep it whole for the whole step.
    """

    def __init__(self, embedding: nn.Embedding, softcap: float, embed_scale: float) -> None:
        super().__init__()
        self.weight = embedding.weight
        self.padding_id = embedding.padding_idx
        self.softcap = softcap
        self.embed_scale = float(np.float32(embed_scale))

    def forward(self, use: type[torch.autograd.Function], *inputs: Any) -> Any:
        return use.apply(self.weight, self, *inputs)

    @property
    def scale(self) -> Tensor:
        """sqrt(H) as transformers keeps it: rounded to fp32, then to the weight's type."""
        return torch.tensor(self.embed_scale, dtype=self.weight.dtype, device=self.weight.device)

    def embed(
        self, ids: Tensor, first_pass_MH: Tensor | None, chunk: int, gradient: WeightGradient
    ) -> tuple[Tensor, Tensor]:
        """Look up `ids` (any shape) and make the soft embedding of the first pass's hidden states (None: M is 0).

        Returns the scaled embeddings [*ids.shape, H] and softmax(logits) @ weight * sqrt(H), [M, H].
        """
        return self(_Embed, ids, first_pass_MH, chunk, gradient)

    def score(
        self,
        hidden_NH: Tensor,
        target_N: Tensor,
        weight_N: Tensor,
        chunk: int,
        gradient: WeightGradient,
        shift: Shift | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy on soft-capped logits. Returns sum(weight_N * nll_N), differentiable, and, detached, nll_N and
        where gradients are off whether no logit is above the target's, bool [N]; else that is empty.
        """
        return self(_Score, hidden_NH, target_N, weight_N, chunk, gradient, shift, torch.is_grad_enabled())

    def sample(self, hidden_NH: Tensor, temperature: Tensor, take: Take, rows: int) -> Tensor:
        """The next tokens' logits by a temperature, `rows` tokens at a time, and the soft embedding of all.

        `take` gets each chunk's logits over the temperature and their softmax [rows, V], in order, fp32 at least.
        Returns softmax(those) @ weight * sqrt(H), [N, H]. No gradient.
        """
        return self(_Sample, hidden_NH, temperature, take, rows)


Room = tuple[Tensor, Tensor]  # [rows, V] for the capped logits of a chunk, and for their exponentials


def capped(
    hidden_NH: Tensor, weight_VH: Tensor, softcap: float, room: Room | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How far below the cap the soft-capped logits of hidden @ weight.T are, in units of twice the cap, and their
    `exponentials`, [N, V], in `room` if there is one; the sums of those and the least, [N, 1]. In fp32 at least.

    (softcap - softcap * tanh(x / softcap)) / (2 * softcap) is sigmoid(-2 * x / softcap), which is a tenth of tanh's
    time on a CPU (torch 2.13).
    """
    if hidden_NH.is_cuda:
        return _fused(_measure)(F.linear(hidden_NH, weight_VH), softcap)
    if hidden_NH.dtype != wide(hidden_NH.dtype):
        return _measure(F.linear(hidden_NH, weight_VH), softcap)
    logits, exponential = (None, None) if room is None else (part[: len(hidden_NH)] for part in room)
    nothing = hidden_NH.new_empty(())
    logits = torch.addmm(nothing, hidden_NH, weight_VH.t(), beta=0, alpha=-2 / softcap, out=logits)
    return _of_sigmoid(logits.sigmoid_(), softcap, exponential)


def _measure(logits_NV: Tensor, softcap: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _of_sigmoid((logits_NV.to(wide(logits_NV.dtype)) * (-2 / softcap)).sigmoid_(), softcap)


def _of_sigmoid(
    below_NV: Tensor, softcap: float, into_NV: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    exponential, least = exponentials(below_NV, softcap, into_NV)
    return below_NV, exponential, exponential.sum(-1, keepdim=True), least


@cache
def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """The elementwise passes of a chunk in one kernel, where there is Triton to make it."""
    if find_spec("triton") is None:
        logger.warning("Triton is not installed: passes over the logits are not fused. pip install triton")
        return function
    return torch.compile(function, dynamic=True)


def exponentials(below_NV: Tensor, softcap: float, into_NV: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """exp(-2 * softcap * (below - least)) [N, V], and least: 0, the cap itself, which no logit exceeds, or a row's
    least where the cap is so wide that others would vanish in fp32.
    """
    if softcap <= WIDEST_CAP:
        return torch.mul(below_NV, -2 * softcap, out=into_NV).exp_(), below_NV.new_zeros(())
    least = below_NV.amin(-1, keepdim=True)
    return torch.sub(below_NV, least, out=into_NV).mul_(-2 * softcap).exp_(), least


def times_slope(exponential_NV: Tensor, below_NV: Tensor) -> Tensor:
    """Times a quarter of the soft cap's derivative, 1 - tanh^2 = 4 * below * (1 - below); both are used up."""
    return exponential_NV.mul_(below_NV.addcmul_(below_NV, below_NV, value=-1))


def _chunks(count: int, chunk: int, weight: Tensor) -> Iterator[tuple[slice, Room | None]]:
    """Rows of a chunk, and memory for what `capped` makes of them, the same for every chunk: on a CPU fresh memory
    costs a page fault every 4 KiB, as much as a pass over it. None: the allocator sees to it.
    """
    vocabulary, hidden = weight.shape
    if not weight.is_cuda:
        # Passes over a chunk that stays in the cache; but each chunk also reads the matrix and its gradient [V, H], so
        # with few rows those are what is passed over.
        chunk = min(chunk, max(CPU_CHUNK // (4 * vocabulary), hidden // 2, 1))
    room = None
    if count and not weight.is_cuda and weight.dtype == wide(weight.dtype):
        rows = min(chunk, count)
        room = weight.new_empty(rows, vocabulary), weight.new_empty(rows, vocabulary)
    for start in range(0, count, chunk):
        yield slice(start, min(start + chunk, count)), room


def _raise(
    exponential: Tensor, total: Tensor, target: Tensor, token_C: Tensor, amount_C: Tensor
) -> tuple[Tensor, Tensor]:
    """Raise one logit of each row: in the exponentials, in place. Returns their sum, and by how much the target's logit
    was raised.
    """
    token, amount = token_C[:, None], amount_C[:, None].to(total.dtype)
    of_token = exponential.gather(-1, token)
    exponential.scatter_(-1, token, of_token * amount.exp())
    return total + of_token * amount.expm1(), amount * (token == target)


def _add_product(total_VH: Tensor, rows_CV: Tensor, rows_CH: Tensor) -> None:
    """Add rows_CV.T @ rows_CH. The product adds to the sum itself where it can: a pass over the fp32 sum for each chunk
    took 58 ms of a step of 240 (H200, 22 chunks of 256 rows).
    """
    if rows_CV.dtype == total_VH.dtype:
        total_VH.addmm_(rows_CV.t(), rows_CH)
    elif rows_CV.is_cuda:
        torch.addmm(total_VH, rows_CV.t(), rows_CH, out_dtype=total_VH.dtype, out=total_VH)
    else:
        total_VH += rows_CV.t() @ rows_CH


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        owner: TiedVocabulary,
        ids: Tensor,
        first_pass_MH: Tensor | None,
        chunk: int,
        gradient: WeightGradient,
    ):
        if first_pass_MH is None:
            first_pass_MH = weight.new_empty(0, weight.shape[1])
        soft_MH = torch.empty_like(first_pass_MH)
        for part, room in _chunks(len(first_pass_MH), chunk, weight):
            _, exponential, total, _ = capped(first_pass_MH[part], weight, owner.softcap, room)
            soft_MH[part] = (exponential.to(weight.dtype) @ weight) / total
        ctx.save_for_backward(weight, ids, first_pass_MH)
        ctx.owner, ctx.chunk, ctx.gradient = owner, chunk, gradient
        return F.embedding(ids, weight) * owner.scale, soft_MH * owner.scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weight, ids, first_pass_MH = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return (None,) * 6
        total = ctx.gradient.take(weight)
        d_embedding, d_soft = (grad * ctx.owner.scale for grad in grads)
        for part, room in _chunks(len(first_pass_MH), ctx.chunk, weight):
            _, exponential, row, _ = capped(first_pass_MH[part], weight, ctx.owner.softcap, room)
            _add_product(total, exponential.to(weight.dtype), (d_soft[part] / row).to(weight.dtype))
        looked_up = (ids != ctx.owner.padding_id).flatten().unsqueeze(-1)
        rows = d_embedding.reshape(-1, d_embedding.shape[-1]) * looked_up
        total.index_add_(0, ids.flatten(), rows.to(total.dtype))
        return total.to(weight.dtype), None, None, None, None, None


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        owner: TiedVocabulary,
        hidden_NH: Tensor,
        temperature: Tensor,
        take: Take,
        rows: int,
    ):
        soft_NH = torch.empty_like(hidden_NH)
        for start in range(0, len(hidden_NH), rows):
            part = slice(start, start + rows)
            logits = F.linear(hidden_NH[part], weight).to(wide(weight.dtype))
            logits.div_(owner.softcap).tanh_().mul_(owner.softcap).div_(temperature)
            share = logits.softmax(-1)
            take(logits, share)
            if share.dtype != weight.dtype:
                share = logits.to(weight.dtype).softmax(-1, wide(weight.dtype)).to(weight.dtype)
            soft_NH[part] = share @ weight
        return soft_NH * owner.scale


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        owner: TiedVocabulary,
        hidden_NH: Tensor,
        target_N: Tensor,
        weight_N: Tensor,
        chunk: int,
        gradient: WeightGradient,
        shift: Shift | None,
        differentiate: bool,
    ):
        nll_N = torch.empty(len(target_N), dtype=wide(hidden_NH.dtype), device=hidden_NH.device)
        d_hidden = torch.empty_like(hidden_NH) if differentiate else None
        d_weight = gradient.open(weight) if differentiate and weight.requires_grad else None
        is_top_N = torch.empty(0 if differentiate else len(target_N), dtype=torch.bool, device=hidden_NH.device)
        cap = owner.softcap
        for part, room in _chunks(len(target_N), chunk, weight):
            below, exponential, total, least = capped(hidden_NH[part], weight, cap, room)
            target = target_N[part, None]
            of_target = below.gather(-1, target)
            raised = 0.0
            if shift is not None:
                total, raised = _raise(exponential, total, target, shift.token_N[part], shift.amount_N[part])
            nll_N[part] = (total.log() + 2 * cap * (of_target - least) - raised).squeeze(-1)
            if d_hidden is None:
                is_top_N[part] = (of_target <= below.amin(-1, keepdim=True)).squeeze(-1)
                continue
            d_target = (exponential.gather(-1, target) - total) * of_target * (1 - of_target)
            slope = _fused(times_slope) if exponential.is_cuda else times_slope
            d_logits = slope(exponential, below).to(weight.dtype)
            d_logits.scatter_(-1, target, d_target.to(weight.dtype))
            # What the logits' gradient lacks, a row's weight over its sum and the slope's 4, is put on the narrow side
            # of both products.
            row = 4 * weight_N[part, None] / total
            torch.mul(d_logits @ weight, row, out=d_hidden[part])
            if d_weight is not None:
                _add_product(d_weight, d_logits, (hidden_NH[part] * row).to(weight.dtype))
        if d_hidden is not None:
            ctx.save_for_backward(d_hidden)
        ctx.gradient = gradient
        ctx.mark_non_differentiable(nll_N, is_top_N)
        return (nll_N * weight_N).sum(), nll_N, is_top_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (d_hidden,) = ctx.saved_tensors
        ctx.gradient.scale(grads[0])
        return None, None, d_hidden * grads[0].to(d_hidden.dtype), None, None, None, None, None, None
