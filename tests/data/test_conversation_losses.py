"""A conversation in one sweep has the losses and gradients of a slow computation by unmodified transformers: for each
canvas, read the tokens before it and denoise it alone. In float64; packed documents too.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DiffusionGemmaForBlockDiffusion

from ds_dgemma.config.run import ObjectiveSection
from ds_dgemma.data.batch import Batch
from ds_dgemma.model.names import checkpoint_name
from ds_dgemma.objective.collate import collate
from ds_dgemma.objective.corruption import Corruption
from ds_dgemma.objective.denoising import DenoisingObjective, TokenWeights
from tests.data.reading import CANVAS, read, settings, write_rows
from tests.parity import open_float64
from tests.reference.fixtures import Case, canvas_logits, encoder_logits, make_model
from tests.reference.float64 import DoublePrecision

CASE = Case(layers="SF", canvas=CANVAS, window=12, vocabulary=131)
AR_WEIGHT = 0.7
# As the released template: calls and responses stand in the model's turn; behind a response it is opened again.
TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|turn>system\n{% for tool in tools %}{{ tool.function.name }}{% endfor %}<turn|>\n"
    "{% endif %}{% for message in messages %}{% if message.role == 'tool' %}[{{ message.content }}]"
    "{% else %}{{ '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}"
    "{% if message.tool_calls %}{{ message.tool_calls[0].function.name }}"
    "({{ message.tool_calls[0].function.arguments.at }})<channel|>"
    "{% else %}{{ message.content | trim + '<turn|>\n' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'tool' %}{{ '<|turn>model\n' }}{% endif %}"
)
CALL = {"type": "function", "function": {"name": "tide", "arguments": {"at": "pier"}}}
TOOL = {"type": "function", "function": {"name": "tide", "description": "", "parameters": {}}}
ROWS = [
    {
        "tools": [TOOL],
        "messages": [
            {"role": "user", "content": "High water?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "tide", "content": "3"},
            {"role": "assistant", "content": "At three."},
            {"role": "user", "content": "And then?"},
            {"role": "assistant", "content": "It falls for six hours.", "weight": 0.5},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "No.", "weight": 0},
            {"role": "user", "content": "Well?"},
            {"role": "assistant", "content": "Yes."},
        ],
    },
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    {"text": "The sea goes out and comes in."},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(CASE).save_pretrained(folder)
    return folder


@pytest.fixture
def batches(tmp_path: Path, tokenizer: Any) -> list[Batch]:
    """A document each, then all of them together."""
    tokenizer.chat_template = TEMPLATE
    config = settings(write_rows(tmp_path / "rows.jsonl", ROWS), learn="all")
    examples = read(config, tokenizer, tmp_path / "cache")
    corruption = Corruption(ObjectiveSection(canvases_per_example="all"), 3, CASE.vocabulary)
    drawn = [(examples[place], 0) for place in range(len(examples))]
    assert len(drawn) == 4  # the answer after the tool's response is a document of its own
    return [*(collate(corruption, [one]) for one in drawn), collate(corruption, drawn)]


def slow_step(model: Any, batch: Batch, weights: TokenWeights) -> Tensor:
    """The loss; tokens' weights are fp32, as ours."""
    loss, behind = torch.zeros((), dtype=torch.float64), 0
    of_canvas, of_pair = batch.canvas_weight_CL * weights.diffusion, batch.ar_weight_A * weights.ar
    for number, length in enumerate(batch.documents):
        tokens = batch.clean_ids_S[behind : behind + length]
        for canvas, (document, start) in enumerate(batch.canvases):
            if document == number:
                coin = bool(batch.self_condition_C[canvas])
                logits = canvas_logits(model, tokens[:start], batch.canvas_ids_CL[canvas], coin, {})
                nll = F.cross_entropy(logits, batch.target_ids_CL[canvas], reduction="none")
                loss = loss + (nll * of_canvas[canvas]).sum()
        following = encoder_logits(model, tokens, {})
        for place, weight in zip(batch.ar_place_A.tolist(), of_pair.tolist(), strict=True):
            if behind < place < behind + length:
                own = place - behind
                loss = loss + weight * F.cross_entropy(following[own - 1], tokens[own])
        behind += length
    return loss


def our_step(objective: DenoisingObjective, batch: Batch, weights: TokenWeights) -> tuple[Tensor, dict[str, Tensor]]:
    objective.zero_grad()
    with DoublePrecision():
        loss = objective(batch, weights).loss
        loss.backward()
    named = objective.model.named_parameters()
    return loss.detach(), {checkpoint_name(name): p.grad.clone() for name, p in named if p.grad is not None}


def test_all_turns_in_one_sweep_equal_a_canvas_at_a_time(checkpoint: Path, batches: list[Batch]):
    *alone, packed = batches
    assert len(packed.canvases) > 8
    assert 0 < int(packed.self_condition_C.sum()) < len(packed.canvases)
    assert {0.5, 1.0} == set(packed.canvas_weight_CL.flatten().tolist()) == set(packed.ar_weight_A.tolist())
    weights = TokenWeights.global_mean(*packed.counts(), AR_WEIGHT, 1)
    objective = open_float64(checkpoint, train_router=True)
    loss, gradients = our_step(objective, packed, weights)

    model: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with DoublePrecision():
        slow = slow_step(model.double(), packed, weights)
        slow.backward()
    torch.testing.assert_close(loss, slow.detach(), rtol=1e-9, atol=0)
    expected = {n: p.grad for n, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9 * largest, msg=name)

    parts = [our_step(objective, batch, weights) for batch in alone]
    torch.testing.assert_close(sum(part for part, _ in parts), loss, rtol=1e-9, atol=0)
    for name, gradient in gradients.items():
        summed = sum(part.get(name, torch.zeros_like(gradient)) for _, part in parts)
        torch.testing.assert_close(summed, gradient, rtol=1e-9, atol=1e-9 * largest, msg=name)
