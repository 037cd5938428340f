"""What a loss depends on, and what it must not depend on. In float64, so that equal means equal to 1e-12."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from ds_dgemma.checkpoint.load import check_places, materialise, plain
from ds_dgemma.checkpoint.weights import WeightReader
from ds_dgemma.config.run import LoraSection, ObjectiveSection
from ds_dgemma.data.batch import Batch
from ds_dgemma.model.build import build_stack
from ds_dgemma.model.lora import FACTORS, LoraLinear, adapt_linears, choose_targets, seed_dropout
from ds_dgemma.model.names import places_of
from ds_dgemma.model.spec import read_spec
from ds_dgemma.model.stack import SweepLayer
from ds_dgemma.model.sweep import Sweep
from ds_dgemma.model.vocabulary import WeightGradient
from ds_dgemma.objective.collate import collate
from ds_dgemma.objective.corruption import Corruption
from ds_dgemma.objective.denoising import DenoisingObjective, RouterBalance, TokenWeights
from tests.parity import open_float64
from tests.reference.examples import one_answer
from tests.reference.fixtures import Case, make_model
from tests.reference.float64 import DoublePrecision
from tests.reference.one_sweep import in_one_sweep

CASE = Case(layers="SF", canvas=4, window=5)
LENGTH = CASE.canvas


class Step(NamedTuple):
    loss: Tensor
    diffusion_nll: Tensor
    ar_nll: Tensor
    gradients: dict[str, Tensor]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(CASE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def objective(checkpoint: Path) -> DenoisingObjective:
    return open_float64(checkpoint, train_router=True)


def make_batch(coin: float = 0.5, documents: Sequence[int] = (0, 1, 2)) -> Batch:
    """Documents of 3, 1 and 2 canvases, all of them scored, with prompts of 3, 6 and 9 tokens, and some fill."""
    draw = np.random.default_rng(5)
    examples = []
    for sample, canvases in enumerate((3, 1, 2)):
        tokens = draw.integers(2, CASE.vocabulary, size=3 * (sample + 1) + canvases * LENGTH - 2)
        examples.append((one_answer(sample, tokens, 3 * (sample + 1), LENGTH, eos_id=1), 0))
    section = ObjectiveSection(self_conditioning_probability=coin, canvases_per_example="all")
    corruption = Corruption(section, seed=3, vocab_size=CASE.vocabulary)
    return collate(corruption, [examples[document] for document in documents])


def only(batch: Batch, canvases: list[int]) -> Batch:
    """A batch without its other canvases."""
    part = replace(
        batch,
        canvas_ids_CL=batch.canvas_ids_CL[canvases],
        target_ids_CL=batch.target_ids_CL[canvases],
        canvas_weight_CL=batch.canvas_weight_CL[canvases],
        canvas_start_C=batch.canvas_start_C[canvases],
        noise_level_C=batch.noise_level_C[canvases],
        canvases=tuple(batch.canvases[canvas] for canvas in canvases),
    )
    return part.with_coins(batch.self_condition_C[canvases])


def step(objective: DenoisingObjective, batch: Batch, weights: TokenWeights) -> Step:
    objective.zero_grad()
    with DoublePrecision():
        parts = objective(batch, weights)
        parts.loss.backward()
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    return Step(parts.loss.detach(), parts.diffusion_nll, parts.ar_nll, gradients)


def hidden(objective: DenoisingObjective, batch: Batch) -> tuple[Tensor, Tensor]:
    """Clean [S, H] and canvas [C, L, H] states that the loss is computed from."""
    with DoublePrecision(), torch.no_grad():
        return objective.hidden_states(batch, WeightGradient())


def weights_of(batch: Batch, shares: int = 1) -> TokenWeights:
    return TokenWeights.global_mean(*batch.counts(), encoder_loss_weight=0.7, shares=shares)


def assert_same(seen: Step, expected: Step) -> None:
    torch.testing.assert_close(seen._asdict(), expected._asdict(), rtol=1e-10, atol=1e-11)


def total(steps: list[Step]) -> Step:
    """The sums over micro-batches."""
    gradients = {name: torch.stack([step.gradients[name] for step in steps]).sum(0) for name in steps[0].gradients}
    loss, diffusion_nll, ar_nll = torch.tensor([step[:3] for step in steps], dtype=torch.float64).sum(0)
    return Step(loss, diffusion_nll, ar_nll, gradients)


def test_a_batch_with_nothing_to_learn_gives_zero_and_not_nan(objective: DenoisingObjective):
    batch = make_batch()
    nothing = batch.counting([False] * 3)
    seen = step(objective, nothing, weights_of(nothing))
    assert (float(seen.loss), float(seen.diffusion_nll), float(seen.ar_nll)) == (0, 0, 0)
    assert all(not gradient.any() for gradient in seen.gradients.values())


def test_the_loss_is_the_weighted_sum_of_two_means(objective: DenoisingObjective):
    batch = make_batch()
    seen = step(objective, batch, weights_of(batch))
    diffusion_tokens, ar_tokens = batch.counts()
    mean = seen.diffusion_nll / diffusion_tokens + 0.7 * seen.ar_nll / ar_tokens
    torch.testing.assert_close(seen.loss, mean, rtol=1e-6, atol=0)  # a token's weight is fp32


def test_micro_batches_add_up_to_the_whole_batch(objective: DenoisingObjective):
    batch = make_batch()
    parts = [step(objective, make_batch(documents=[number]), weights_of(batch)) for number in range(3)]
    assert_same(total(parts), step(objective, batch, weights_of(batch)))


def test_canvases_of_one_document_count_like_canvases_scored_alone(objective: DenoisingObjective):
    batch = make_batch()
    assert len(set(batch.self_condition_C[:3].tolist())) == 2  # coins differ in a document
    both = weights_of(batch)
    diffusion, ar = TokenWeights(both.diffusion, 0.0), TokenWeights(0.0, both.ar)
    together = step(objective, batch, diffusion)
    alone = [step(objective, only(batch, canvases), diffusion) for canvases in ([0, 3], [1, 4], [2, 5])]
    assert_same(total(alone)._replace(ar_nll=together.ar_nll), together)
    # and the encoder's loss does not see how many there are
    assert_same(step(objective, only(batch, [0]), ar)._replace(diffusion_nll=together.diffusion_nll),
                step(objective, batch, ar))  # fmt: skip


def test_a_canvas_is_unaffected_by_the_coins_of_others(objective: DenoisingObjective):
    batch = make_batch()
    _, expected = hidden(objective, batch)
    for canvas in (0, 2, 3, 5):
        flipped = ~batch.self_condition_C
        flipped[canvas] ^= True
        _, seen = hidden(objective, batch.with_coins(flipped))
        torch.testing.assert_close(seen[canvas], expected[canvas], rtol=1e-12, atol=1e-12)
        assert int(((seen - expected).abs().amax((1, 2)) > 1e-3).sum()) == 5  # all the other canvases


def test_a_canvas_sees_neither_its_own_clean_text_nor_anything_later_nor_another_document(
    objective: DenoisingObjective,
):
    batch = make_batch(coin=1.0)
    _, expected = hidden(objective, batch)
    for canvas in (0, 1, 4):
        document, start = batch.canvases[canvas]
        before = sum(batch.documents[:document])
        ids, canvases = torch.full_like(batch.clean_ids_S, 9), torch.full_like(batch.canvas_ids_CL, 9)
        ids[before : before + start] = batch.clean_ids_S[before : before + start]
        canvases[canvas] = batch.canvas_ids_CL[canvas]
        _, seen = hidden(objective, replace(batch, clean_ids_S=ids, canvas_ids_CL=canvases))
        torch.testing.assert_close(seen[canvas], expected[canvas], rtol=1e-12, atol=1e-12)

        ids[before + start - 1] = 9
        _, seen = hidden(objective, replace(batch, clean_ids_S=ids))
        assert (seen[canvas] - expected[canvas]).abs().min(0).values.max() > 1e-3  # every token reads it


def test_clean_text_sees_no_canvas_and_nothing_later_nor_another_document(objective: DenoisingObjective):
    batch = make_batch(coin=1.0)
    expected, _ = hidden(objective, batch)
    first = batch.documents[0]
    ids = torch.full_like(batch.clean_ids_S, 9)
    ids[first : first + 8] = batch.clean_ids_S[first : first + 8]
    everything_else = replace(batch, clean_ids_S=ids, canvas_ids_CL=torch.full_like(batch.canvas_ids_CL, 9)).with_coins(
        ~batch.self_condition_C
    )
    seen, _ = hidden(objective, everything_else)
    torch.testing.assert_close(seen[first : first + 8], expected[first : first + 8], rtol=1e-12, atol=1e-12)
    assert (seen[first + 8] - expected[first + 8]).abs().max() > 1e-3


def open_recomputing(checkpoint: Path, checkpointing: Any, monkeypatch: pytest.MonkeyPatch) -> DenoisingObjective:
    """As `open_float64`, with layers that are in double precision within the backward pass too."""
    stack = build_stack(read_spec(str(checkpoint)), train_router=True, activation_checkpointing=checkpointing)
    reader = WeightReader(checkpoint)
    materialise(stack, reader, check_places(stack, places_of(stack), reader), plain(torch.float64, "cpu"), device="cpu")
    block = SweepLayer.block

    def doubled(*args: Any, **more: Any) -> Any:
        with DoublePrecision():
            return block(*args, **more)

    monkeypatch.setattr(SweepLayer, "block", doubled)
    return DenoisingObjective(stack, logits_chunk_mib=1).train()


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
@pytest.mark.parametrize("coin", [0.0, 0.5, 1.0])
def test_what_is_computed_again_changes_no_number(checkpointing, coin, objective, checkpoint, monkeypatch):
    batch, balance = make_batch(coin), RouterBalance(1.0, lambda tokens: tokens)
    kept = [step(objective, batch, weights_of(batch)), *balance_step(objective, batch, balance)]
    objective = open_recomputing(checkpoint, checkpointing, monkeypatch)
    again = [step(objective, batch, weights_of(batch)), *balance_step(objective, batch, balance)]
    assert_same(again[0], kept[0])
    torch.testing.assert_close(again[1:], kept[1:], rtol=1e-10, atol=1e-12)


def test_what_is_computed_again_keeps_to_the_routers_first_choice(checkpoint, objective, monkeypatch):
    """In bf16 a near tie falls otherwise when a layer sees other shapes; here it is made to."""
    again = open_recomputing(checkpoint, "full", monkeypatch)
    batch = make_batch()
    expected = step(objective, batch, weights_of(batch)).gradients
    router = type(again.model.layers[0].router)
    forward = router.forward

    def other_in_backward(self: Any, hidden: Tensor) -> Any:
        probability, weights, chosen = forward(self, hidden)
        in_backward = torch._C._current_graph_task_id() != -1
        return probability, weights, chosen.flip(0) if in_backward else chosen

    monkeypatch.setattr(router, "forward", other_in_backward)
    torch.testing.assert_close(step(again, batch, weights_of(batch)).gradients, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("checkpointing", ["full", "selective", "none"])
def test_dropout_of_adapters_falls_alike_in_the_forward_and_when_it_is_computed_again(
    checkpointing, checkpoint, monkeypatch
):
    """The gradient is the loss's: a step along it changes the loss by its square, dropout drawn alike."""
    objective = open_recomputing(checkpoint, checkpointing, monkeypatch)
    objective.requires_grad_(False)
    lora = LoraSection(r=4, lora_alpha=8, lora_dropout=0.3, target_modules="all-linear")
    targets = [target for target in choose_targets(objective.model, lora) if target.name.startswith("layers.")]
    adapt_linears(objective.model, targets, lora)
    draw = torch.Generator().manual_seed(0)
    factors = []
    for module in objective.modules():
        if isinstance(module, LoraLinear):
            for name in FACTORS:
                shape = getattr(module, name).shape
                values = 0.1 * torch.randn(shape, generator=draw, dtype=torch.float64)
                setattr(module, name, torch.nn.Parameter(values))
                factors.append(getattr(module, name))
    batch = make_batch(coin=0.0)  # the first guess changes the loss, and is no part of its gradient

    def loss() -> Tensor:
        seed_dropout(0, 1, 0)
        with DoublePrecision():
            return objective(batch, weights_of(batch)).loss

    loss().backward()
    square = sum(float(factor.grad.square().sum()) for factor in factors)
    size = 1e-6 / square**0.5
    moved = []
    for sign in (1, -1):
        with torch.no_grad():
            for factor in factors:
                factor.add_(factor.grad, alpha=sign * size)
        moved.append(float(loss().detach()))
        with torch.no_grad():
            for factor in factors:
                factor.sub_(factor.grad, alpha=sign * size)
    assert (moved[0] - moved[1]) / (2 * size) == pytest.approx(square, rel=1e-6)


def balance_step(
    objective: DenoisingObjective, batch: Batch, balance: RouterBalance
) -> tuple[float, dict[str, Tensor]]:
    """A micro-batch's part of the load-balance loss and its gradients, no other loss beside it."""
    objective.zero_grad()
    with DoublePrecision():
        parts = objective(batch, TokenWeights(0.0, 0.0), balance)
        parts.loss.backward()
    assert float(parts.loss.detach()) == pytest.approx(balance.weight * float(parts.router))
    return float(parts.router), {
        name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None and p.grad.any()
    }


def routers_said(objective: DenoisingObjective, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Probabilities [N, E] and chosen experts [N, k] of every layer, clean tokens first, in one graph of all layers."""
    said: dict[int, tuple[Tensor, Tensor]] = {}

    def listen(number: int) -> Callable[..., None]:
        return lambda router, inputs, output: said.update({number: (output[0], output[2])})  # the last call counts

    def in_one_graph(sweep: Any, clean: Tensor, canvas: Tensor) -> tuple[Tensor, Tensor]:
        return in_one_sweep(sweep, clean, canvas, sweep._calls.all)

    routers = [layer.router for layer in objective.model.sweep_layers()]
    hooks = [router.register_forward_hook(listen(number)) for number, router in enumerate(routers)]
    with DoublePrecision(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sweep, "denoise", in_one_graph)
        objective(batch, TokenWeights(0.0, 0.0))
    for hook in hooks:
        hook.remove()
    return [said[number] for number in range(len(routers))]


def slow_balance_loss(said: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The definition, an expert at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for probability_NE, chosen_Nk in said:
        experts = probability_NE.shape[1]
        for expert in range(experts):
            f = sum(expert in chosen for chosen in chosen_Nk.tolist()) / len(chosen_Nk)
            P = probability_NE[:, expert].mean()
            total = total + experts * f * P / len(said)
    return total


def test_the_routers_loss_and_its_gradients_are_the_definitions(objective: DenoisingObjective):
    batch = make_batch()
    ours, gradients = balance_step(objective, batch, RouterBalance(1.0, lambda tokens: tokens))
    said = routers_said(objective, batch)
    assert len(said[0][0]) == batch.tokens()

    slow = slow_balance_loss(said)
    assert ours == pytest.approx(float(slow.detach()), rel=1e-12)
    objective.zero_grad()
    slow.backward()
    for name, parameter in objective.named_parameters():
        nothing = torch.zeros_like(parameter)
        expected = nothing if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradients.get(name, nothing), expected, rtol=1e-9, atol=1e-13)
    assert "model.layers.0.router.proj.weight" in gradients

    (experts, k) = (said[0][0].shape[1], said[0][1].shape[1])
    theirs = [load_balancing_loss_func((probability.log(),), experts, k) for probability, _ in said]
    assert ours == pytest.approx(sum(float(loss.detach()) for loss in theirs) / len(theirs), rel=1e-6)  # theirs is fp32


def test_micro_batches_parts_of_the_routers_loss_add_up_to_the_whole_batchs(objective: DenoisingObjective):
    batch = make_batch()
    counts: list[Tensor] = []
    whole, gradients = balance_step(
        objective, batch, RouterBalance(0.5, lambda tokens: counts.append(tokens) or tokens)
    )
    parts = [
        balance_step(objective, make_batch(documents=[number]), RouterBalance(0.5, lambda tokens: counts[0]))
        for number in range(3)
    ]
    assert sum(part for part, _ in parts) == pytest.approx(whole, rel=1e-10)
    for name, gradient in gradients.items():
        summed = sum(part.get(name, torch.zeros_like(gradient)) for _, part in parts)
        torch.testing.assert_close(summed, gradient, rtol=1e-9, atol=1e-12)
