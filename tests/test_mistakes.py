"""The comparison with transformers sees every usual mistake: each is made on purpose, and a loss or a gradient moves.

Most were met in other implementations of this objective (`mistakes.py` has those of positions, layers,
self-conditioning and losses); here are those of who sees whom, and of the one encode that ours makes.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from ds_dgemma.model import attention, parts, sweep
from ds_dgemma.model.parts import Tokens
from ds_dgemma.model.sweep import Call, Sweep
from tests.mistakes import CASE, LENGTH, MISTAKES, Run, mistake
from tests.parity import open_float64, step_float64
from tests.reference.cases import QUANTITIES, TOLERANCES, compare, read_case, to_batch
from tests.reference.cases import Case as ParityCase
from tests.reference.fixtures import write_case
from tests.reference.masks import TokenLayout, attention_masks, clean_and_canvases
from tests.reference.one_sweep import in_one_sweep

COINS = "mixed"


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
    """Let `change` (layout, window, right masks) make dense masks, under which everything attends, in one sweep."""
    window = run.objective.model.window

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, _: None, *, tokens: Tokens, **more: Any) -> Any:
        layout = clean_and_canvases(tokens.documents, tokens.canvases, LENGTH)
        kind = "sliding_attention" if module.is_sliding else "full_attention"
        mask = change(layout, window, attention_masks(layout, window))[kind]
        k, v = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value))
        return F.scaled_dot_product_attention(query, k, v, mask, scale=module.scaling).transpose(1, 2), None

    def read(self: Any, clean_NH: Tensor, guess_NH: Tensor, differentiates: bool) -> Tensor:
        with torch.no_grad():
            return in_one_sweep(self, clean_NH, guess_NH, self._calls.clean_and_guesses)[1]

    def denoise(self: Any, clean_NH: Tensor, canvas_NH: Tensor) -> tuple[Tensor, Tensor]:
        return in_one_sweep(self, clean_NH, canvas_NH, self._calls.all)

    AttentionInterface.register("masked", attend)
    run.patch.setattr(run.objective.model.config.text_config, "_attn_implementation", "masked")
    run.patch.setattr(Sweep, "read", read)
    run.patch.setattr(Sweep, "denoise", denoise)


def from_canvas(layout: TokenLayout) -> Tensor:
    return layout.is_canvas_T[:, None]


def replace_sliding(right: dict[str, Tensor], where: Tensor, wrong: Tensor) -> dict[str, Tensor]:
    return right | {"sliding_attention": torch.where(where, wrong, right["sliding_attention"])}


def wider(layout: TokenLayout, window: int) -> Tensor:
    return attention_masks(layout, window + 1)["sliding_attention"]


@mistake
def the_encoder_window_is_one_longer(run: Run):
    change_masks(run, lambda layout, w, right: replace_sliding(right, ~from_canvas(layout), wider(layout, w)))


@mistake
def a_canvas_sees_window_clean_tokens(run: Run):
    change_masks(run, lambda layout, w, right: replace_sliding(right, from_canvas(layout), wider(layout, w)))


@mistake
def every_canvas_token_has_its_own_window(run: Run):
    def change(layout: TokenLayout, window: int, right: dict[str, Tensor]) -> dict[str, Tensor]:
        near = layout.position_T[None, :] > layout.position_T[:, None] - window
        return replace_sliding(right, from_canvas(layout), right["full_attention"] & near)

    change_masks(run, change)


@mistake
def the_decoder_has_no_window(run: Run):
    change_masks(run, lambda layout, _, right: replace_sliding(right, from_canvas(layout), right["full_attention"]))


@mistake
def a_canvas_reads_its_own_clean_text(run: Run):
    def change(layout: TokenLayout, window: int, right: dict[str, Tensor]) -> dict[str, Tensor]:
        return attention_masks(replace(layout, start_T=layout.start_T + LENGTH), window)

    change_masks(run, change)


# Clean tokens and canvases


@mistake
def documents_see_each_other(run: Run):
    def change(layout: TokenLayout, window: int, right: dict[str, Tensor]) -> dict[str, Tensor]:
        return attention_masks(replace(layout, document_T=torch.zeros_like(layout.document_T)), window)

    change_masks(run, change)


@mistake
def clean_tokens_read_the_canvas(run: Run):
    def change(layout: TokenLayout, window: int, right: dict[str, Tensor]) -> dict[str, Tensor]:
        causal = layout.position_T[None, :] <= layout.position_T[:, None]
        own = layout.document_T[None, :] == layout.document_T[:, None]
        seen = causal & own & layout.is_canvas_T[None, :] & ~from_canvas(layout)
        return {kind: mask | seen for kind, mask in right.items()}

    change_masks(run, change)


@mistake
def the_canvas_is_causal(run: Run):
    def change(layout: TokenLayout, window: int, right: dict[str, Tensor]) -> dict[str, Tensor]:
        causal = layout.position_T[None, :] <= layout.position_T[:, None]
        return {kind: mask & causal for kind, mask in right.items()}

    change_masks(run, change)


# Encode once


def change_parts(run: Run, name: str, wrong: Callable[..., Any]) -> None:
    """Cut attention into parts with `wrong` in the place of one of the functions that do."""
    for module in (attention, parts):
        run.patch.setattr(module, name, wrong, raising=module is parts)
    run.patch.setattr(attention, "plan", lambda tokens, window: tuple(parts.parts(tokens, window)))


def change_visible(run: Run, change: Callable[[int, int, int], tuple[int, int]]) -> None:
    """Let `change` (start, begin, end) say which clean tokens a canvas sees on sliding layers."""
    right = parts.visible

    def wrong(start: int, window: int | None) -> tuple[int, int]:
        begin, end = right(start, window)
        return (begin, end) if window is None else change(start, begin, end)

    change_parts(run, "visible", wrong)


@mistake
def a_canvas_reads_one_clean_key_too_many(run: Run):
    change_visible(run, lambda start, begin, end: (max(0, begin - 1), end))


@mistake
def a_canvas_reads_one_clean_key_too_few(run: Run):
    change_visible(run, lambda start, begin, end: (begin + 1 if begin else 0, end))


@mistake
def a_canvas_reads_its_own_first_clean_token(run: Run):
    change_visible(run, lambda start, begin, end: (begin, end + 1))


@mistake
def a_canvas_reads_the_end_of_its_document(run: Run):
    clean = min(run.batch.documents)
    change_visible(run, lambda start, begin, end: (clean - (end - begin), clean))


def change_clean_parts(run: Run, change: Callable[[parts.Part], parts.Part | None]) -> None:
    """Let `change` spoil or leave out parts of the clean tokens' attention on sliding layers."""
    right = parts._clean_parts

    def wrong(documents: tuple[int, ...], window: int | None):
        spoilt = right(documents, window) if window is None else map(change, right(documents, window))
        return (part for part in spoilt if part is not None)

    change_parts(run, "_clean_parts", wrong)


@mistake
def a_block_does_not_read_the_block_before(run: Run):
    change_clean_parts(run, lambda part: None if part.backwards else part)


@mistake
def a_block_reads_all_of_the_block_before(run: Run):
    change_clean_parts(run, lambda part: replace(part, causal=part.causal and not part.backwards))


@mistake
def only_the_first_window_is_read(run: Run):
    """Blocks that all read the keys of the first one."""
    first = lambda span: replace(span, begin=0, end=span.end - span.begin)  # noqa: E731
    change_clean_parts(run, lambda part: replace(part, keys=first(part.keys)) if part.backwards else part)


@mistake
def kept_keys_are_another_layers(run: Run):
    denoise = Sweep.denoise

    def swapped(self: Any, clean: Tensor, canvas: Tensor) -> tuple[Tensor, Tensor]:
        first, second, *_ = (layer_pass for layer_pass in self._passes if layer_pass.window)
        first.seen, second.seen = ([kept.detach() for kept in other.seen] for other in (second, first))
        return denoise(self, clean, canvas)

    run.patch.setattr(Sweep, "denoise", swapped)


def change_guesses(run: Run, change: Callable[[Call], Call]) -> None:
    """Let `change` make other calls of the first guesses."""
    right = sweep.make_calls

    def wrong(*args: Any) -> sweep.Calls:
        calls = right(*args)
        return replace(calls, guesses=change(calls.guesses), clean_and_guesses=change(calls.clean_and_guesses))

    run.patch.setattr(sweep, "make_calls", wrong)


@mistake
def the_first_guess_reads_too_little(run: Run):
    def shorten(call: Call) -> Call:
        canvases = tuple(canvas._replace(start=canvas.start - 1) for canvas in call.tokens.canvases)
        return replace(call, tokens=replace(call.tokens, canvases=canvases))

    change_guesses(run, shorten)


@mistake
def the_first_guess_is_of_other_rows(run: Run):
    others = tuple(range(len(run.batch.guessed)))
    assert others != run.batch.guessed
    run.batch = replace(run.batch, guessed=others, guessed_M=torch.tensor(others))


# All of them


def test_without_a_mistake_nothing_moves(run: Run, case: ParityCase):
    assert furthest(run, case) < 0.1
    change_masks(run, lambda layout, window, right: right)
    assert furthest(run, case) < 0.1


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name: str, run: Run, case: ParityCase):
    MISTAKES[name](run)
    assert furthest(run, case) > 10
