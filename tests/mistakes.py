"""Mistakes that were met in implementations of this objective, each made on purpose; `test_mistakes.py` sees them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_dgemma.data.batch import Batch
from ds_dgemma.model import sweep, vocabulary
from ds_dgemma.objective.denoising import DenoisingObjective
from tests.reference.fixtures import CASES

CASE = replace(CASES["base"], layers="SSF")
LENGTH = CASE.canvas


@dataclass
class Run:
    """One step about to be made, to be spoilt."""

    objective: DenoisingObjective
    batch: Batch
    patch: pytest.MonkeyPatch

    @property
    def layers(self) -> Any:
        return self.objective.model.layers

    @property
    def full_layers(self) -> list[Any]:
        return [layer for layer in self.layers if layer.self_attn.v_proj is None]


MISTAKES: dict[str, Callable[[Run], object]] = {}


def mistake(make: Callable[[Run], object]) -> Callable[[Run], object]:
    MISTAKES[make.__name__] = make
    return make


# Positions


@mistake
def canvas_positions_start_at_the_prompts_end(run: Run):
    prompts = torch.tensor([row.prompt for row in CASE.rows])
    run.batch = replace(run.batch, canvas_start_C=prompts)  # what sees what goes by the host's `canvases`


@mistake
def canvas_positions_start_after_the_longest_document(run: Run):
    longest = max(run.batch.documents)
    run.batch = replace(run.batch, canvas_start_C=torch.full_like(run.batch.canvas_start_C, longest))


@mistake
def positions_go_on_from_document_to_document(run: Run):
    run.batch = replace(run.batch, position_S=torch.arange(run.batch.clean_ids_S.numel()))


def rope_frequencies(run: Run, count: int, divisor: int) -> None:
    """Give full layers `count` rotary frequencies, theta ** (-2i / divisor), and zeros for the rest."""
    rotary: Any = run.objective.model.rotary_emb
    theta = rotary.config.rope_parameters["full_attention"]["rope_theta"]
    frequencies = torch.zeros_like(rotary.full_attention_inv_freq)
    frequencies[:count] = theta ** (-2.0 * torch.arange(count) / divisor)
    rotary.full_attention_inv_freq = frequencies


@mistake
def full_layers_rotate_every_dimension(run: Run):
    size = run.full_layers[0].self_attn.head_dim
    rope_frequencies(run, size // 2, size)


@mistake
def rope_divides_by_the_rotated_dimensions(run: Run):
    rotated = run.full_layers[0].self_attn.head_dim // 4
    rope_frequencies(run, rotated // 2, rotated)


# Layers


@mistake
def the_encoder_uses_the_decoders_scalar(run: Run):
    for layer in run.layers:
        layer.encoder_layer_scalar = layer.layer_scalar


@mistake
def values_are_normed_keys(run: Run):
    for layer in run.full_layers:
        layer.self_attn.v_norm = nn.Sequential(layer.self_attn.k_norm, layer.self_attn.v_norm)


@mistake
def attention_scores_are_scaled(run: Run):
    for layer in run.layers:
        layer.self_attn.scaling = layer.self_attn.head_dim**-0.5


@mistake
def the_router_reads_what_the_experts_read(run: Run):
    for layer in run.layers:
        layer.router.register_forward_pre_hook(lambda _, args, norm=layer.pre_feedforward_layernorm_2: norm(args[0]))


def change_routing(run: Run, change: Callable[[Any, Tensor, Tensor, Tensor], Tensor]) -> None:
    """Let `change` (router, probabilities, weights, experts) make the routing weights."""
    for layer in run.layers:
        layer.router.register_forward_hook(lambda router, _, out: (out[0], change(router, *out), out[2]))


@mistake
def routing_weights_are_not_renormalised(run: Run):
    change_routing(run, lambda r, probability, _, top: probability.gather(-1, top) * r.per_expert_scale[top])


@mistake
def per_expert_scale_is_left_out(run: Run):
    change_routing(run, lambda r, probability, weights, top: weights / r.per_expert_scale[top])


@mistake
def routing_weights_are_detached(run: Run):
    change_routing(run, lambda r, probability, weights, top: weights.detach())


@mistake
def clean_keys_and_values_are_detached(run: Run):
    keep_all = sweep.keep_all
    run.patch.setattr(sweep, "keep_all", lambda *args: [kept.detach() for kept in keep_all(*args)])


# Self-conditioning


@mistake
def an_unconditioned_canvas_skips_the_block(run: Run):
    def skip(block: nn.Module, inputs: tuple[Tensor, Tensor], output: Tensor) -> Tensor:
        embeddings, signal = inputs
        return torch.where(signal.any(-1, keepdim=True), output, embeddings)

    run.objective.model.self_conditioning.register_forward_hook(skip)


@mistake
def the_coin_is_ignored(run: Run):
    run.batch = run.batch.with_coins(torch.ones(len(CASE.rows), dtype=torch.bool))


def change_embed(run: Run, change: Callable[[Tensor], Tensor]) -> None:
    """Let `change` make the soft embedding from the right one."""
    embed = run.objective.model.embed_tokens.embed

    def changed(*args) -> tuple[Tensor, Tensor]:
        looked_up, soft = embed(*args)
        return looked_up, change(soft)

    run.patch.setattr(run.objective.model.embed_tokens, "embed", changed)


@mistake
def the_soft_embedding_is_not_scaled(run: Run):
    change_embed(run, lambda soft: soft / run.objective.model.embed_tokens.scale)


@mistake
def the_soft_embedding_is_detached(run: Run):
    change_embed(run, lambda soft: soft.detach())


@mistake
def the_first_guess_has_a_temperature(run: Run):
    right, embed = vocabulary.exponentials, run.objective.model.embed_tokens.embed

    def changed(*args) -> tuple[Tensor, Tensor]:
        with run.patch.context() as during_embed:
            during_embed.setattr(vocabulary, "exponentials", lambda *inputs: (right(*inputs)[0] ** (1 / 0.6), None))
            return embed(*args)

    run.patch.setattr(run.objective.model.embed_tokens, "embed", changed)


# Losses


@mistake
def only_noised_tokens_are_learned(run: Run):
    noised = run.batch.canvas_ids_CL != run.batch.target_ids_CL
    run.batch = replace(run.batch, canvas_weight_CL=run.batch.canvas_weight_CL * noised)


def change_pairs(run: Run, weigh: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
    """Let `weigh` (weights, positions, end of prompt, end of response) make the weights of the encoder's loss, without
    changing what they are divided by.
    """
    batch = run.batch
    place, lengths = batch.ar_place_A, torch.tensor(batch.documents)
    of_A = torch.arange(len(lengths)).repeat_interleave(lengths)[place]
    prompt = torch.tensor([row.prompt for row in CASE.rows])[of_A]
    response = torch.tensor([row.response for row in CASE.rows])[of_A]
    right = batch.counts()
    wrong = weigh(batch.ar_weight_A, batch.position_S[place], prompt, prompt + response) * 1.0
    run.batch = replace(batch, ar_weight_A=wrong)
    run.patch.setattr(Batch, "counts", lambda self: right)


@mistake
def the_encoder_loss_is_a_mean_of_examples(run: Run):
    def weigh(weight: Tensor, position: Tensor, prompt: Tensor, end: Tensor) -> Tensor:
        pairs = torch.tensor(run.batch.documents) - 1
        return len(weight) / len(pairs) / pairs.repeat_interleave(pairs)

    change_pairs(run, weigh)


@mistake
def the_encoder_loss_leaves_out_the_prompt(run: Run):
    change_pairs(run, lambda weight, position, prompt, end: weight * (position >= prompt))


@mistake
def the_encoder_loss_leaves_out_the_fill(run: Run):
    change_pairs(run, lambda weight, position, prompt, end: weight * (position < end))


@mistake
def the_encoder_loss_predicts_a_documents_first_token(run: Run):
    place, first = run.batch.ar_place_A.clone(), run.batch.documents[0]
    place[first - 1] = first  # in the place of its second
    run.batch = replace(run.batch, ar_place_A=place)


@mistake
def the_padding_row_gets_a_gradient(run: Run):
    run.objective.model.embed_tokens.padding_id = -1
