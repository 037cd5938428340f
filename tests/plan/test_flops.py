"""The arithmetic that `plan` and `metrics.jsonl` share is what torch counts while a step runs."""

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ds_dgemma.config.file import load_config
from ds_dgemma.model.flops import (
    Work,
    batch_work,
    canvas_pairs,
    clean_pairs,
    example_work,
    guess_work,
    image_pairs,
    products_of,
)
from ds_dgemma.objective.denoising import DenoisingObjective, TokenWeights
from ds_dgemma.plan.inventory import build_stack_for
from ds_dgemma.plan.plan import read_shapes
from ds_dgemma.tools.tiny import make_tiny
from tests import generate_parity
from tests.benchmarks.step import make_batch
from tests.reference.masks import attention_masks, clean_and_canvases

ATEN: Any = torch.ops.aten
LORA = "lora={r: 4, target_parameters: [experts.gate_up_proj, experts.down_proj]}"


def attention_flops(query: Any, key: Any, causal: bool) -> int:
    """Of a part: two products over the pairs that are seen."""
    rows, heads, T, size = query
    return 4 * rows * heads * size * (T * (T + 1) // 2 if causal else T * key[2])


def forward_formula(query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False, **_: Any) -> int:
    return attention_flops(query, key, causal)


def backward_formula(
    grad: Any, query: Any, key: Any, value: Any, out: Any, log: Any, dropout: float, causal: bool, **_: Any
) -> int:
    return 2 * attention_flops(query, key, causal)  # four products; the scores, made once more, are not counted


def product_formula(left: Any, right: Any, *_: Any, **__: Any) -> int:
    """Of matrices; sums that are written as a product with a vector are none."""
    (*batch, rows, inner), columns = left, right[-1]
    return 2 * prod(batch) * rows * inner * columns if min(rows, inner, columns) > 1 else 0


def added_formula(total: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
    return product_formula(left, right)


KNOWN = {
    ATEN.mm: product_formula,
    ATEN.bmm: product_formula,
    ATEN.addmm_: added_formula,
    ATEN._scaled_dot_product_flash_attention_for_cpu: forward_formula,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: backward_formula,
}


@pytest.mark.parametrize(
    ("checkpointing", "settings"),
    [
        ("full", []),
        ("selective", []),
        ("none", []),
        ("full", ["model.train_router=true"]),
        ("full", [LORA]),
        ("none", ["model.freeze=['*.embed_tokens.weight', '*.self_conditioning.*', '*.layers.0.*']"]),
    ],
    ids=["full", "selective", "none", "router", "LoRA", "frozen"],
)
def test_a_step_does_what_is_counted(checkpointing: Any, settings: list[str], sudoku_run: Path) -> None:
    config = load_config(sudoku_run, [*settings, "parallel.grouped_matmul=off"])
    spec, _ = read_shapes(config)
    products = products_of(build_stack_for(config, spec))
    stack = build_stack_for(config, spec).to_empty(device="cpu")
    torch.manual_seed(0)
    for tensor in (*stack.parameters(), *stack.buffers()):
        torch.nn.init.normal_(tensor, std=0.02)
    stack.activation_checkpointing = checkpointing
    text: Any = spec.text_config
    length = products.canvas_length
    batch = make_batch(3 * length, 3 * length, 3, text.vocab_size, length)  # coins: rows 0 and 2
    counter = FlopCounterMode(display=False, custom_mapping=KNOWN)
    with counter:
        DenoisingObjective(stack, 1)(batch, TokenWeights(1.0, 1.0)).loss.backward()

    rows = [(6 * length, (start,), (start,) if row != 1 else ()) for row, start in batch.canvases]
    work = Work(0.0, 0.0)
    for clean, starts, guessed in rows:
        work += example_work(products, clean, starts, checkpointing)
        for start in guessed:
            work += guess_work(products, start)
    assert work.useful + work.again == counter.get_total_flops()
    assert (work.again > 0) is (checkpointing != "none" or products.trains_vocabulary)
    assert batch_work(products, rows) == work.useful


@pytest.mark.parametrize("rule", ["generate", "sliding"])
def test_visible_pairs_are_those_of_the_mask(rule: Any) -> None:
    layout = clean_and_canvases([50], [(0, 42), (0, 8)], 8, images=[(0, 3, 33)])  # longer than the window
    for kind, mask in attention_masks(layout, 16, rule).items():
        window = 16 if kind == "sliding_attention" else None
        pairs = clean_pairs(50, window) + canvas_pairs(42, 8, window) + canvas_pairs(8, 8, window)
        assert pairs + image_pairs(30, window, rule) == int(mask.sum()), kind


def test_the_vision_tower_does_what_is_counted(tmp_path: Path) -> None:
    make_tiny("shapes", tmp_path / "model")
    stack = generate_parity.open_plain(tmp_path / "model")
    products = products_of(stack)
    side, pool = 8, stack.config.vision_config.pooling_kernel_size  # soft tokens
    place = torch.arange(side * pool)
    position = torch.cartesian_prod(place, place).flip(1)[None]
    pixels = torch.rand(1, len(position[0]), 3 * stack.config.vision_config.patch_size**2)
    stack.vision.open(torch.device("cpu"), torch.float32)
    counter = FlopCounterMode(display=False, custom_mapping=KNOWN)
    with counter:
        soft = stack.image_features((pixels, position), torch.empty(1, 1))
    assert soft is not None
    assert len(soft) == side**2
    projection = 2 * side**2 * products.projects
    assert products.tower.flops(side**2) + projection == counter.get_total_flops()
