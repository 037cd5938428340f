"""Chunked look-up, soft embedding and loss equal plain autograd, every gradient of them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_dgemma.model.vocabulary import Shift, TiedVocabulary, WeightGradient

VOCABULARY, HIDDEN, TOKENS, SOFTCAP, PAD = 23, 6, 13, 3.0, 0
SCALE = HIDDEN**0.5


class Inputs:
    """A micro-batch: ids with padding among them, first-pass states, targets, weights with zeros."""

    def __init__(self, seed: int, guessed: int = 5) -> None:
        draw = torch.Generator().manual_seed(seed)
        random = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
        self.ids = torch.randint(VOCABULARY, (TOKENS,), generator=draw)
        self.ids[3] = PAD
        self.first_pass = 2 * random(guessed, HIDDEN)
        self.target = torch.randint(VOCABULARY, (TOKENS,), generator=draw)
        self.target[5] = PAD
        self.weight = random(TOKENS).abs() * (torch.arange(TOKENS) % 4 != 1)

    def between(self, embedded: Tensor, soft: Tensor, mix: Tensor) -> Tensor:
        """Stands for the model: the hidden states that are scored depend on both embeddings."""
        return torch.tanh((embedded + F.pad(soft, (0, 0, 0, TOKENS - len(soft)))) @ mix) * 2


def make_weights() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    embedding = torch.randn(VOCABULARY, HIDDEN, generator=draw, dtype=torch.float64)
    mix = torch.randn(HIDDEN, HIDDEN, generator=draw, dtype=torch.float64)
    return embedding, mix


def plain(embedding: Tensor, mix: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The same with whole logits: loss and per-token negative log-likelihood."""
    cap = lambda hidden: SOFTCAP * torch.tanh(hidden @ embedding.t() / SOFTCAP)  # noqa: E731
    scale = float(np.float32(SCALE))
    soft = cap(inputs.first_pass).detach().softmax(-1) @ embedding * scale
    hidden = inputs.between(F.embedding(inputs.ids, embedding, padding_idx=PAD) * scale, soft, mix)
    nll = F.cross_entropy(cap(hidden), inputs.target, reduction="none")
    return (nll * inputs.weight).sum(), nll


def chunked(vocabulary: TiedVocabulary, mix: Tensor, inputs: Inputs, chunk: int) -> tuple[Tensor, Tensor]:
    gradient = WeightGradient()
    embedded, soft = vocabulary.embed(inputs.ids, inputs.first_pass, chunk, gradient)
    return vocabulary.score(inputs.between(embedded, soft, mix), inputs.target, inputs.weight, chunk, gradient)[:2]


def make_vocabulary(embedding: Tensor) -> TiedVocabulary:
    table = nn.Embedding(VOCABULARY, HIDDEN, padding_idx=PAD, _weight=embedding.clone())
    return TiedVocabulary(table, softcap=SOFTCAP, embed_scale=SCALE)


def gradients(batches: list[Inputs]) -> tuple[Tensor, Tensor]:
    """Plain gradients of the matrix and of the model between, summed over micro-batches."""
    embedding, mix = (value.requires_grad_() for value in make_weights())
    for inputs in batches:
        plain(embedding, mix, inputs)[0].backward()
    assert embedding.grad is not None
    assert mix.grad is not None
    return embedding.grad, mix.grad


def assert_equal(seen: Tensor | None, expected: Tensor) -> None:
    assert seen is not None
    torch.testing.assert_close(seen, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("chunk", [1, 4, TOKENS, 1000])
@pytest.mark.parametrize("guessed", [0, 5, TOKENS], ids=lambda count: f"{count} guessed")
def test_the_loss_and_every_gradient_equal_plain_autograd(chunk: int, guessed: int):
    inputs = Inputs(seed=2, guessed=guessed)
    embedding, mix = make_weights()
    vocabulary = make_vocabulary(embedding)
    loss, nll = chunked(vocabulary, mix.requires_grad_(), inputs, chunk)
    loss.backward()

    expected_loss, expected_nll = plain(*make_weights(), inputs)
    expected_embedding, expected_mix = gradients([inputs])
    assert_equal(loss, expected_loss)
    assert_equal(nll, expected_nll)
    assert_equal(vocabulary.weight.grad, expected_embedding)
    assert_equal(mix.grad, expected_mix)


def test_a_scaled_loss_scales_every_gradient():
    inputs = Inputs(seed=3)
    embedding, mix = make_weights()
    vocabulary = make_vocabulary(embedding)
    (chunked(vocabulary, mix.requires_grad_(), inputs, chunk=4)[0] * 0.125).backward()
    expected_embedding, expected_mix = gradients([inputs])
    assert_equal(vocabulary.weight.grad, expected_embedding / 8)
    assert_equal(mix.grad, expected_mix / 8)


@pytest.mark.parametrize("interleaved", [False, True], ids=["one after the other", "both forwards first"])
def test_micro_batches_accumulate(interleaved: bool):
    batches = [Inputs(seed=4), Inputs(seed=5, guessed=0)]
    embedding, mix = make_weights()
    vocabulary = make_vocabulary(embedding)
    mix.requires_grad_()
    losses = (chunked(vocabulary, mix, inputs, chunk=4)[0] for inputs in batches)
    for loss in list(losses) if interleaved else losses:
        loss.backward()
    expected_embedding, expected_mix = gradients(batches)
    assert_equal(vocabulary.weight.grad, expected_embedding)
    assert_equal(mix.grad, expected_mix)


def test_a_frozen_matrix_gets_no_gradient_nor_room_for_one_and_changes_no_other(monkeypatch: pytest.MonkeyPatch):
    inputs = Inputs(seed=6)
    embedding, mix = make_weights()
    vocabulary = make_vocabulary(embedding)
    vocabulary.weight.requires_grad_(False)
    monkeypatch.setattr(WeightGradient, "open", lambda self, weight: pytest.fail("made room for a gradient"))
    chunked(vocabulary, mix.requires_grad_(), inputs, chunk=4)[0].backward()
    assert vocabulary.weight.grad is None
    assert_equal(mix.grad, gradients([inputs])[1])


def test_without_gradients_the_loss_is_the_same():
    inputs = Inputs(seed=7)
    embedding, mix = make_weights()
    with torch.no_grad():
        loss, nll = chunked(make_vocabulary(embedding), mix, inputs, chunk=4)
    expected_loss, expected_nll = plain(embedding, mix, inputs)
    assert not loss.requires_grad
    assert_equal(loss, expected_loss)
    assert_equal(nll, expected_nll)


def test_a_token_of_weight_zero_changes_no_gradient():
    inputs = Inputs(seed=8)
    seen = []
    for hidden_from_loss in (inputs.target, torch.where(inputs.weight == 0, 7, inputs.target)):
        inputs.target = hidden_from_loss
        embedding, mix = make_weights()
        vocabulary = make_vocabulary(embedding)
        chunked(vocabulary, mix, inputs, chunk=4)[0].backward()
        seen.append(vocabulary.weight.grad)
    assert torch.equal(*seen)


def test_in_bfloat16_the_gradient_is_summed_in_float32():
    """Many tokens of one target: a bfloat16 sum stands still once it is 256 times the next summand."""
    tokens = 2048
    vocabulary = make_vocabulary(make_weights()[0].bfloat16())
    hidden = torch.ones(tokens, HIDDEN, dtype=torch.bfloat16)
    target, weight = torch.full((tokens,), 3), torch.ones(tokens)
    sums = []
    for chunk in (1, tokens):
        gradient = WeightGradient()
        vocabulary.score(hidden, target, weight, chunk, gradient)
        sums.append(gradient.take(vocabulary.weight))
    assert sums[0].dtype == torch.float32
    torch.testing.assert_close(*sums, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("softcap", [3.0, 30.0, 300.0])
@pytest.mark.parametrize("differentiate", [False, True])
def test_a_raised_logit_enters_the_softmax_and_no_derivative(softcap: float, differentiate: bool):
    """With any soft cap, in fp32 too, and where the raised token is the target."""
    inputs = Inputs(seed=4)
    embedding, mix = (20 * value for value in make_weights())
    token = torch.where(torch.arange(TOKENS) % 3 == 0, inputs.target, (inputs.target + 5) % VOCABULARY)
    amount = torch.linspace(0, 22, TOKENS)
    hidden = inputs.between(embedding[inputs.ids], inputs.first_pass, mix).requires_grad_()
    table = nn.Embedding(VOCABULARY, HIDDEN, padding_idx=PAD, _weight=embedding.clone())
    vocabulary = TiedVocabulary(table, softcap=softcap, embed_scale=SCALE)

    capped = softcap * torch.tanh(hidden @ embedding.t() / softcap)
    raised = capped.scatter_add(1, token[:, None], amount[:, None].double())
    expected = F.cross_entropy(raised, inputs.target, reduction="none")
    (wanted,) = torch.autograd.grad((expected * inputs.weight).sum(), hidden)
    with torch.set_grad_enabled(differentiate):
        loss, nll, _ = vocabulary.score(hidden, inputs.target, inputs.weight, 4, WeightGradient(), Shift(token, amount))
    assert_equal(nll, expected)
    if differentiate:
        (seen,) = torch.autograd.grad(loss, hidden)
        torch.testing.assert_close(seen, wanted, rtol=1e-10, atol=1e-12)
        _, narrow, _ = vocabulary.float().score(
            hidden.float(), inputs.target, inputs.weight.float(), 4, WeightGradient(), Shift(token, amount)
        )
        torch.testing.assert_close(narrow, expected.float(), rtol=1e-4, atol=1e-4)
