"""The comparison with transformers sees every usual mistake: each is made on purpose, and a loss or a gradient moves.

Most were met in other implementations of this objective; the last ones belong to the one sweep that ours makes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ds_dgemma.data.batch import Batch, FirstPass
from ds_dgemma.model import masks, stack, vocabulary
from ds_dgemma.objective import denoising
from ds_dgemma.objective.denoising import DenoisingObjective
from tests.parity import open_float64, step_float64
from tests.reference.cases import QUANTITIES, TOLERANCES, compare, read_case, to_batch
from tests.reference.cases import Case as ParityCase
from tests.reference.fixtures import CASES, write_case
from tests.reference.masks import TokenLayout

CASE = CASES["base"]
LENGTH = CASE.canvas
COINS = "mixed"


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


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> ParityCase:
    folder: Path = tmp_path_factory.mktemp("cases") / "base"
    write_case(folder, CASE)
    return read_case(folder)


@pytest.fixture
def run(case: ParityCase, monkeypatch: pytest.MonkeyPatch) -> Run:
    objective = open_float64(case.directory / "model", case.train_router)
    return Run(objective, to_batch(case.tensors, COINS), monkeypatch)


def furthest(run: Run, case: ParityCase) -> float:
    """The largest difference of a loss or a gradient norm, in tolerances."""
    seen = step_float64(run.objective, run.batch)
    differences = dict(zip(QUANTITIES, compare(seen, case, COINS, "float64"), strict=False))
    tolerances = dict(zip(QUANTITIES, TOLERANCES["float64"], strict=True))
    return max(differences[name] / tolerances[name] for name in ("diffusion loss", "AR loss", "gradient norm"))


# Who sees whom


def change_masks(run: Run, change: Callable[[TokenLayout, int, dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Let `change` (layout, window, right masks) make the masks."""
    right = masks.attention_masks
    run.patch.setattr(stack, "attention_masks", lambda layout, window: change(layout, window, right(layout, window)))


def from_canvas(layout: TokenLayout) -> Tensor:
    return layout.is_canvas_BT[:, None, :, None]


def replace_sliding(right: dict[str, Tensor], where: Tensor, wrong: Tensor) -> dict[str, Tensor]:
    return right | {"sliding_attention": torch.where(where, wrong, right["sliding_attention"])}


def wider(layout: TokenLayout, window: int) -> Tensor:
    return masks.attention_masks(layout, window + 1)["sliding_attention"]


@mistake
def the_encoder_window_is_one_longer(run: Run):
    change_masks(run, lambda layout, w, right: replace_sliding(right, ~from_canvas(layout), wider(layout, w)))


@mistake
def a_canvas_sees_window_clean_tokens(run: Run):
    change_masks(run, lambda layout, w, right: replace_sliding(right, from_canvas(layout), wider(layout, w)))


@mistake
def the_canvas_window_ends_with_the_padded_batch(run: Run):
    def change(layout: TokenLayout, window: int, right: dict[str, Tensor]) -> dict[str, Tensor]:
        clean = layout.position_BT.shape[1] - LENGTH
        late = (layout.position_BT >= clean - (window - 1)) | layout.is_canvas_BT
        return replace_sliding(right, from_canvas(layout), right["full_attention"] & late[:, None, None, :])

    change_masks(run, change)


@mistake
def every_canvas_token_has_its_own_window(run: Run):
    def change(layout: TokenLayout, window: int, right: dict[str, Tensor]) -> dict[str, Tensor]:
        near = layout.position_BT[:, None, :] > layout.position_BT[:, :, None] - window
        return replace_sliding(right, from_canvas(layout), right["full_attention"] & near[:, None])

    change_masks(run, change)


@mistake
def the_decoder_has_no_window(run: Run):
    change_masks(run, lambda layout, _, right: replace_sliding(right, from_canvas(layout), right["full_attention"]))


@mistake
def a_canvas_reads_its_own_clean_text(run: Run):
    def change(layout: TokenLayout, window: int, right: dict[str, Tensor]) -> dict[str, Tensor]:
        return masks.attention_masks(replace(layout, start_BT=layout.start_BT + LENGTH), window)

    change_masks(run, change)


# Positions


def change_canvas_positions(run: Run, first: Callable[[int, int], Tensor]) -> None:
    """Let a canvas's positions begin at `first(rows, clean tokens)`, [B]; what sees what stays right."""
    right = denoising.clean_and_canvases

    def lay_out(clean_valid: Tensor, start: Tensor, length: int) -> TokenLayout:
        layout = right(clean_valid, start, length)
        wrong = first(*clean_valid.shape)[:, None] + torch.arange(length)
        position = torch.cat([layout.position_BT[:, :-length], wrong.expand(len(start), length)], dim=1)
        return replace(layout, position_BT=position)

    run.patch.setattr(denoising, "clean_and_canvases", lay_out)


@mistake
def canvas_positions_start_at_the_prompts_end(run: Run):
    prompts = torch.tensor([row.prompt for row in CASE.rows])
    conditioned = torch.tensor(run.batch.first_pass.rows)
    change_canvas_positions(run, lambda rows, _: prompts if rows == len(prompts) else prompts[conditioned])


@mistake
def canvas_positions_start_after_the_padded_batch(run: Run):
    change_canvas_positions(run, lambda rows, clean: torch.full((rows,), clean))


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
    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options):
        clean = query.shape[2] - LENGTH
        cut_key, cut_value = (torch.cat([s[:, :, :clean].detach(), s[:, :, clean:]], dim=2) for s in (key, value))
        encoded, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
        decoded, _ = sdpa_attention_forward(module, query, cut_key, cut_value, mask, **options)
        return torch.cat([encoded[:, :clean], decoded[:, clean:]], dim=1), None

    AttentionInterface.register("detached_clean", attend)
    run.patch.setattr(run.objective.model.config.text_config, "_attn_implementation", "detached_clean")


# Self-conditioning


@mistake
def an_unconditioned_canvas_skips_the_block(run: Run):
    def skip(block: nn.Module, inputs: tuple[Tensor, Tensor], output: Tensor) -> Tensor:
        embeddings, signal = inputs
        return torch.where(signal.any(-1, keepdim=True), output, embeddings)

    run.objective.model.self_conditioning.register_forward_hook(skip)


@mistake
def the_coin_is_ignored(run: Run):
    everything = FirstPass(tuple(range(len(CASE.rows))), prefix=run.batch.clean_ids_BS.shape[1])
    coins = torch.ones_like(run.batch.self_condition_BK)
    run.batch = replace(run.batch, self_condition_BK=coins, first_pass=everything)


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
    right, embed = vocabulary.capped_logits, run.objective.model.embed_tokens.embed

    def changed(*args) -> tuple[Tensor, Tensor]:
        with run.patch.context() as during_embed:
            during_embed.setattr(vocabulary, "capped_logits", lambda *inputs: right(*inputs) / 0.6)
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


# One sweep


@mistake
def clean_tokens_read_the_canvas(run: Run):
    def change(layout: TokenLayout, window: int, right: dict[str, Tensor]) -> dict[str, Tensor]:
        causal = layout.position_BT[:, None, :] <= layout.position_BT[:, :, None]
        seen = (causal & layout.is_canvas_BT[:, None, :])[:, None] & ~from_canvas(layout)
        return {kind: mask | seen for kind, mask in right.items()}

    change_masks(run, change)


@mistake
def the_canvas_is_causal(run: Run):
    def change(layout: TokenLayout, window: int, right: dict[str, Tensor]) -> dict[str, Tensor]:
        causal = layout.position_BT[:, None, :] <= layout.position_BT[:, :, None]
        return {kind: mask & causal[:, None] for kind, mask in right.items()}

    change_masks(run, change)


@mistake
def the_first_pass_reads_too_little(run: Run):
    needed = int(run.batch.canvas_start_BK[list(run.batch.first_pass.rows)].max())
    run.batch = replace(run.batch, first_pass=replace(run.batch.first_pass, prefix=needed - 1))


@mistake
def the_first_pass_takes_other_rows(run: Run):
    rows = tuple(range(len(run.batch.first_pass.rows)))
    run.batch = replace(run.batch, first_pass=replace(run.batch.first_pass, rows=rows))


# All of them


def test_without_a_mistake_nothing_moves(run: Run, case: ParityCase):
    assert furthest(run, case) < 0.1


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name: str, run: Run, case: ParityCase):
    MISTAKES[name](run)
    assert furthest(run, case) > 10
