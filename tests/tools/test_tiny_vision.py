"""Preset `shapes`: unmodified transformers loads model and image processor, and what a picture shows gets through."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, DiffusionGemmaForBlockDiffusion

from ds_dgemma.data.shapes import COLOURS, KINDS, draw, record
from ds_dgemma.tools.tiny import make_tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny") / "shapes"
    make_tiny("shapes", made)
    return made


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    loaded: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(checkpoint, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    return model.eval()


def soft_tokens(checkpoint: Path, model: Any, pictures: list[Image.Image]) -> torch.Tensor:
    inputs = AutoImageProcessor.from_pretrained(checkpoint)(images=pictures, return_tensors="pt")
    with torch.no_grad():
        features = model.model.encoder.get_image_features(inputs["pixel_values"], inputs["image_position_ids"])
    assert len(features.pooler_output) == sum(inputs["num_soft_tokens_per_image"])
    return features.pooler_output


def answers(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choice([*COLOURS]) + rng.choice(KINDS) for _ in range(4)) for _ in range(count)]


def test_a_drawn_picture_is_not_rescaled_and_any_other_is_taken(checkpoint: Path, model: Any) -> None:
    process = AutoImageProcessor.from_pretrained(checkpoint)
    drawn = draw("RcGsBtYx", random.Random(0))
    inputs = process(images=[drawn], return_tensors="pt")
    pixels = torch.tensor([*drawn.tobytes()]).view(64, 64, 3) / 255
    first = inputs["pixel_values"][0, 17].view(4, 4, 3)  # the second patch of the second row
    assert torch.allclose(first, pixels[4:8, 4:8].float(), atol=1e-6)
    sizes = [(300, 200), (9, 500), (1000, 30)]
    assert len(soft_tokens(checkpoint, model, [Image.new("RGB", size) for size in sizes])) <= 3 * 70


def test_a_linear_map_of_the_soft_tokens_tells_colours_and_kinds(checkpoint: Path, model: Any) -> None:
    names = [colour + kind for colour in COLOURS for kind in KINDS]

    def cells(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        shown = answers(count, seed)
        rng = random.Random(seed)
        found = soft_tokens(checkpoint, model, [draw(answer, rng) for answer in shown])
        by_cell = found.view(count, 2, 4, 2, 4, -1).transpose(2, 3).flatten(0, 2).flatten(1)  # 4 x 4 tokens a cell
        labels = torch.tensor([names.index(answer[place : place + 2]) for answer in shown for place in (0, 2, 4, 6)])
        return by_cell, labels

    (seen, label), (unseen, truth) = cells(300, 0), cells(50, 1)
    middle = seen.mean(0)
    seen, unseen = seen - middle, unseen - middle
    for parts, divide, least in ((6, lambda x: x // 4, 0.99), (4, lambda x: x % 4, 0.85)):
        wanted = torch.nn.functional.one_hot(divide(label), parts).float() - 1 / parts
        weight = torch.linalg.solve(seen.T @ seen + torch.eye(seen.shape[1]), seen.T @ wanted)
        assert ((unseen @ weight).argmax(-1) == divide(truth)).float().mean() > least


def test_every_cell_changes_the_soft_tokens_under_it_most(checkpoint: Path, model: Any) -> None:
    before, *after = (
        soft_tokens(checkpoint, model, [draw(answer, random.Random(0))]).view(2, 4, 2, 4, -1)
        for answer in ("RsRsRsRs", "BsRsRsRs", "RsBsRsRs", "RsRsBsRs", "RsRsRsBs")
    )
    for cell, changed in enumerate(after):
        moved = (changed - before).norm(dim=-1).mean((1, 3)).flatten()
        assert moved.argmax() == cell
        assert moved[cell] > 3 * moved.sort().values[-2]


def test_a_content_may_be_parts_or_a_string(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    turns = record("a.png", "RcGsBtYx")["messages"]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<bos><|turn>user<|image|>What is where?<turn|><|turn>modelRcGsBtYx<turn|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert len(ids) == len("BTu") + 1 + len("What is where?") + len("/Tm") + 8 + len("/")
    plain = [{"role": "user", "content": "What is where?"}, turns[1]]
    assert tokenizer.apply_chat_template(plain, tokenize=False) == text.replace("<|image|>", "")
