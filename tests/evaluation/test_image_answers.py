"""Prompts with images are answered as unmodified transformers answers them, token for token."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, DiffusionGemmaForBlockDiffusion

from ds_dgemma.data.shapes import write_shapes
from ds_dgemma.errors import UserError
from ds_dgemma.evaluation.answers import answer_prompts
from ds_dgemma.evaluation.open_model import Source, find_model, load_model
from ds_dgemma.evaluation.questions import read_prompts
from ds_dgemma.tools.tiny import make_tiny
from tests.reference import fixtures

SETTINGS = {"max_denoising_steps": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, and prompts with one, no and three images."""
    folder = tmp_path_factory.mktemp("images")
    make_tiny("shapes", folder / "model")
    write_shapes("test", 5, 0, folder / "drawn.jsonl")
    text, images = {"type": "text", "text": "What is where?"}, []
    for line in (folder / "drawn.jsonl").read_text().splitlines():
        images.append(json.loads(line)["messages"][0]["content"][0])
    contents = [[images[0], text], [text], [images[1], images[2], text, images[3]]]
    rows = [{"messages": [{"role": "user", "content": content}]} for content in contents]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_answers_are_transformers(folder: Path) -> None:
    found = find_model(Source(str(folder / "model")), SETTINGS)
    _, prompts = read_prompts(folder / "prompts.jsonl", found)
    assert [len(prompt.images) for prompt in prompts] == [1, 0, 3]
    ours = answer_prompts(load_model(found), prompts, 3, [5, 6, 7])

    theirs: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(folder / "model", dtype=torch.float32).eval()
    process = AutoImageProcessor.from_pretrained(folder / "model")
    for said, prompt, seed in zip(ours, prompts, (5, 6, 7), strict=True):
        ids, more = torch.tensor([prompt]), {}
        if prompt.images:
            more = dict(process([Image.open(image.file) for image in prompt.images], return_tensors="pt"))
            del more["num_soft_tokens_per_image"]
            more["mm_token_type_ids"] = (ids == theirs.config.image_token_id).long()
        torch.manual_seed(seed)
        told = theirs.generate(input_ids=ids, disable_compile=True, **more, **SETTINGS).sequences[0, len(prompt) :]
        assert said.answer.tokens == told.tolist()[: len(said.answer.tokens)]


def test_a_picture_that_is_gone_is_named(folder: Path, tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": [{"type": "image", "path": "gone.png"}]}]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=r"prompts\.jsonl:1: .*no image .*gone\.png: No such file"):
        read_prompts(tmp_path / "prompts.jsonl", find_model(Source(str(folder / "model")), {}))


def test_transformers_plain_forward_still_reads_images_under_another_mask_than_generate() -> None:
    """Should this fail, transformers has mended it: training through its forward then sees what `generate()` sees."""
    case = fixtures.CASES["images"]
    model = fixtures.make_model(case).eval()
    batch = fixtures.make_batch(case)
    images = fixtures.images_of(batch, 0)
    images["pixel_values"] = images["pixel_values"].float()
    tokens = batch["input_ids"][0, : batch["attention_mask"][0].sum()]
    is_image = (tokens == model.config.image_token_id)[None].long()
    with torch.no_grad():
        as_generated, _ = fixtures.encode(model, tokens, images)
        plain = model.model.encoder(
            input_ids=tokens[None], attention_mask=torch.ones_like(tokens)[None], mm_token_type_ids=is_image, **images
        ).last_hidden_state[0]
    assert (plain - as_generated).abs().max() > 0.1
