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
    prompts = torch.tensor([[row.prompt] for row in CASE.rows])
    run.batch = replace(run.batch, canvas_start_BK=prompts)  # what sees what goes by the host's `starts`


@mistake
def canvas_positions_start_after_the_padded_batch(run: Run):
    clean = run.batch.clean_ids_BS.shape[1]
    run.batch = replace(run.batch, canvas_start_BK=torch.full_like(run.batch.canvas_start_BK, clean))


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
    run.batch = run.batch.with_coins(torch.ones(len(CASE.rows), 1, dtype=torch.bool))


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
    noised = run.batch.canvas_ids_BKL != run.batch.target_ids_BKL
    run.batch = replace(run.batch, supervised_BKL=run.batch.supervised_BKL & noised)


@mistake
def the_encoder_loss_is_a_mean_of_examples(run: Run):
    score = run.objective.model.embed_tokens.score
    pairs = run.batch.ar_pairs_BS

    def changed(hidden: Tensor, target: Tensor, weight: Tensor, *args):
        clean = pairs / pairs.sum(1, keepdim=True) / len(pairs)
        return score(hidden, target, torch.cat([weight[: -pairs.numel()], clean.flatten()]), *args)

    run.patch.setattr(run.objective.model.embed_tokens, "score", changed)


def change_pairs(run: Run, keep: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Keep the pairs whose second token `keep` (its position, end of prompt, end of response) wants."""
    prompt = torch.tensor([row.prompt for row in CASE.rows])[:, None]
    response = torch.tensor([row.response for row in CASE.rows])[:, None]
    position = torch.arange(1, run.batch.clean_ids_BS.shape[1])
    wrong = run.batch.ar_pairs_BS & keep(position, prompt, prompt + response)
    run.patch.setattr(Batch, "ar_pairs_BS", property(lambda batch: wrong))


@mistake
def the_encoder_loss_leaves_out_the_prompt(run: Run):
    change_pairs(run, lambda position, prompt, end: position >= prompt)


@mistake
def the_encoder_loss_leaves_out_the_fill(run: Run):
    change_pairs(run, lambda position, prompt, end: position < end)


@mistake
def the_padding_row_gets_a_gradient(run: Run):
    run.objective.model.embed_tokens.padding_id = -1
