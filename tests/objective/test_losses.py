"""The losses are their formulas: through the whole objective, gradients too, in float64, and at the ends of t."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from ds_dgemma.config.run import LossName, ObjectiveSection
from ds_dgemma.data.batch import Batch
from ds_dgemma.model.vocabulary import Shift, TiedVocabulary, WeightGradient
from ds_dgemma.objective.collate import collate
from ds_dgemma.objective.corruption import Corruption
from ds_dgemma.objective.denoising import DenoisingObjective, TokenWeights
from ds_dgemma.objective.losses import LARGEST_WEIGHT, LOSSES, inverse_kept, kept_over_drawn
from tests.parity import open_float64
from tests.reference.examples import one_answer
from tests.reference.fixtures import Case, make_model
from tests.reference.float64 import DoublePrecision

CASE = Case(layers="SF", canvas=4, window=5)
V, K_REAL = CASE.vocabulary, 262_144
WEIGHTS = TokenWeights(diffusion=0.3, ar=0.05)


@pytest.fixture(scope="module")
def objective(tmp_path_factory: pytest.TempPathFactory) -> DenoisingObjective:
    folder = tmp_path_factory.mktemp("model")
    make_model(CASE).save_pretrained(folder)
    return open_float64(folder, train_router=True)


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Two examples of 3 and 1 canvases, the second's of weight 0.5; levels and coins of all sorts."""
    draw = np.random.default_rng(5)
    examples = []
    for sample, (canvases, weight) in enumerate(((3, 1.0), (1, 0.5))):
        tokens = np.append(draw.integers(2, V, size=2 + canvases * CASE.canvas), 1)
        examples.append((one_answer(sample, tokens, 3, CASE.canvas, eos_id=1, weight=weight), 0))
    corruption = Corruption(ObjectiveSection(canvases_per_example="all"), seed=3, vocab_size=V)
    made = collate(corruption, examples)
    assert len(made.canvases) == 4
    assert made.noise_level_C.max() - made.noise_level_C.min() > 0.3
    assert (made.canvas_ids_CL == made.target_ids_CL).float().mean() > 0.1  # kept ones and
    assert (made.canvas_ids_CL != made.target_ids_CL).float().mean() > 0.1  # others
    return made


def cross_entropy(logits: list[Tensor], token: int) -> Tensor:
    """-log softmax, spelled out."""
    return torch.stack(logits).exp().sum().log() - logits[token]


def slow_losses(objective: DenoisingObjective, batch: Batch, loss: str) -> tuple[Tensor, Tensor]:
    """What is reported for the diffusion, and the whole loss: a token at a time, from the hidden states."""
    clean, canvas = objective.hidden_states(batch, WeightGradient())
    embed = objective.model.embed_tokens
    logits = lambda hidden: list(torch.tanh(embed.weight @ hidden / embed.softcap) * embed.softcap)  # noqa: E731
    diffusion = ar = torch.zeros((), dtype=torch.float64)
    for k, t in enumerate(batch.noise_levels):
        for place in range(CASE.canvas):
            f, x = logits(canvas[k, place]), int(batch.canvas_ids_CL[k, place])
            if "leave_one_out" in loss:
                f[x] = f[x] + math.log(1 + V * (1 - t) / t)
            weight = (min(1 / (1 - t), 100) if "reweighted" in loss else 1) * (1.0 if k < 3 else 0.5)
            diffusion = diffusion + weight * cross_entropy(f, int(batch.target_ids_CL[k, place]))
    for i in range(1, len(clean)):
        if i != batch.documents[0]:
            weight = 1.0 if i < batch.documents[0] + 3 else 0.5
            ar = ar + weight * cross_entropy(logits(clean[i - 1]), int(batch.clean_ids_S[i]))
    return diffusion, WEIGHTS.diffusion * diffusion + WEIGHTS.ar * ar


def gradients(objective: DenoisingObjective) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_and_its_gradients_are_the_formulas(
    loss: LossName, objective: DenoisingObjective, batch: Batch, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(objective, "loss", LOSSES[loss])
    with DoublePrecision():
        objective.zero_grad()
        parts = objective(batch, WEIGHTS)
        parts.loss.backward()
        ours = gradients(objective)
        objective.zero_grad()
        diffusion, total = slow_losses(objective, batch, loss)
        total.backward()
    # levels, weights and shifts are fp32
    torch.testing.assert_close(parts.diffusion_nll, diffusion.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(parts.loss.detach(), total.detach(), rtol=1e-6, atol=0)
    theirs = gradients(objective)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        error = (gradient - theirs[name]).norm() / theirs[name].norm()
        assert error < 2e-6, f"{name} {error}"


def test_no_two_losses_are_alike(objective: DenoisingObjective, batch: Batch, monkeypatch: pytest.MonkeyPatch):
    assert set(get_args(LossName)) == set(LOSSES)
    seen = []
    for loss in LOSSES.values():
        monkeypatch.setattr(objective, "loss", loss)
        with DoublePrecision(), torch.no_grad():
            seen.append(objective(batch, WEIGHTS))
    assert len({round(float(parts.diffusion_nll), 3) for parts in seen}) == 4
    assert len({float(parts.ar_nll) for parts in seen}) == 1  # a loss is of the canvases


def test_the_loss_of_the_config_is_the_one_that_is_made(objective: DenoisingObjective):
    assert DenoisingObjective(objective.model, logits_chunk_mib=1).loss == LOSSES["base"]
    assert DenoisingObjective(objective.model, 1, "leave_one_out").loss == LOSSES["leave_one_out"]


def test_a_weight_is_one_over_the_share_kept_whatever_the_vocabulary_and_never_above_its_clip():
    level = torch.tensor([0.0, 0.5, 0.75, 0.98, 0.995, 1.0])
    expected = torch.tensor([1.0, 2.0, 4.0, 50.0, LARGEST_WEIGHT, LARGEST_WEIGHT])
    torch.testing.assert_close(inverse_kept(level), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("vocabulary", [V, K_REAL])
def test_a_shift_is_finite_and_right_at_every_level(vocabulary: int):
    level = torch.tensor([1e-12, 1e-6, 1e-3, 0.1, 0.5, 0.9, 0.999, 1 - 2**-20, 1 - 2**-24, 1.0])
    expected = [math.log1p(vocabulary * (1 - t) / t) for t in level.tolist()]
    shift = kept_over_drawn(level, vocabulary)
    assert shift.dtype == torch.float32
    torch.testing.assert_close(shift, torch.tensor(expected), rtol=1e-6, atol=0)
    assert shift[-1] == 0  # nothing was kept: what is seen says nothing
    none = kept_over_drawn(torch.zeros(1), vocabulary)
    assert shift[0] < none < math.inf


@pytest.mark.parametrize("level", [0.0, 1e-3, 0.5, 1.0])
def test_in_fp32_a_shifted_loss_and_its_gradient_keep_their_digits(level: float):
    """Shifts of 49 nats on top of a cap of 30, whether the token that is seen is the target or not."""
    draw = torch.Generator().manual_seed(0)
    embedding, hidden = torch.nn.Embedding(4096, 16), 3 * torch.randn(8, 16, generator=draw)
    target = torch.randint(4096, (8,), generator=draw)
    seen = torch.where(torch.arange(8) < 4, target, target - 1).clamp(min=0)
    amount = kept_over_drawn(torch.full((8,), level), 4096)

    hidden.requires_grad_(True)
    vocabulary = TiedVocabulary(embedding, softcap=30.0, embed_scale=1.0)
    loss, _, _ = vocabulary.score(hidden, target, torch.ones(8), 3, WeightGradient(), Shift(seen, amount))
    (gradient,) = torch.autograd.grad(loss, hidden)

    wide = hidden.detach().double().requires_grad_(True)
    logits = 30 * torch.tanh(wide @ embedding.weight.detach().double().T / 30)
    logits = logits + amount.double()[:, None] * torch.nn.functional.one_hot(seen, 4096)
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    (expected_gradient,) = torch.autograd.grad(expected, wide)
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-5)
