"""Images in rows: the tokens and patches that transformers' processor makes, in any form of row; what is refused."""

import base64
import io
import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from ds_dgemma.config.run import ObjectiveSection
from ds_dgemma.data.image_files import PROCESSOR_FILES, ImageFiles, image_files
from ds_dgemma.data.messages import BadRow
from ds_dgemma.data.pictures import Origin
from ds_dgemma.data.split import read_split
from ds_dgemma.data.tokenizer import load_tokenizer
from ds_dgemma.errors import UserError
from ds_dgemma.inspection.sequences import sequences
from ds_dgemma.model.spec import read_spec
from ds_dgemma.objective.collate import collate
from ds_dgemma.objective.corruption import Corruption
from ds_dgemma.tools.tiny import make_tiny
from tests.data.reading import settings

SIZES = {"wide.png": (90, 30), "high.jpg": (20, 70), "square.png": (64, 64)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("images") / "model"
    make_tiny("shapes", made)
    return made


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures, and a place for those that rows bring as bytes."""
    draw = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        Image.fromarray(draw.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(tmp_path / name)
    monkeypatch.setattr("ds_dgemma.data.image_files.FOLDER", tmp_path / "kept")
    return tmp_path


def read(folder: Path, model: Path, *rows: dict[str, Any], file: str = "rows.jsonl", **data: Any):
    """The examples of rows, what reads their images, and the tokenizer."""
    if rows:
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = read_spec(str(model))
    tokenizer = load_tokenizer(model, spec.text_config.vocab_size)  # type: ignore[union-attr]
    config = settings(folder / file, **data)
    examples = read_split(config, "train", spec, tokenizer, cache=folder / "cache")
    return examples, image_files(tokenizer, spec, config.data), tokenizer


def asked(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}, {"role": "assistant", "content": "RcGs"}]}


def picture(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "image", "path": name, **more}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def as_transformers(model: Path, files: list[Path]) -> Any:
    """What the checkpoint's processor makes of pictures."""
    images = [Image.open(file) for file in files]
    return AutoImageProcessor.from_pretrained(model)(images, return_tensors="np")


def test_tokens_and_patches_are_those_of_the_processor(folder: Path, model: Path) -> None:
    row = asked(picture("wide.png"), text("What is where?"), picture("high.jpg"))
    examples, files, tokenizer = read(folder, model, row)
    example, made = examples[0], as_transformers(model, [folder / "wide.png", folder / "high.jpg"])
    image, begin, end = files.tokens
    # transformers' `Gemma4Processor.replace_image_token`, in what `apply_chat_template` writes
    prompt = tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
    for soft in made["num_soft_tokens_per_image"]:
        prompt = prompt.replace(image, f"{begin}{'#' * soft}{end}", 1)
    wanted = tokenizer(prompt.replace("#", image), add_special_tokens=False)["input_ids"]
    assert example.tokens_S[: len(wanted)].tolist() == wanted
    assert example.spans[0].start == len(wanted)

    pictures = collate(Corruption(ObjectiveSection(), 0, 32), [(example, 0)], files).pictures
    assert pictures
    is_image = torch.from_numpy(example.tokens_S == tokenizer.convert_tokens_to_ids(image))
    assert pictures.place_K.tolist() == is_image.nonzero().flatten().tolist()
    assert [end - start for _, start, end in pictures.blocks] == list(made["num_soft_tokens_per_image"])
    for number, (pixels, position) in enumerate(zip(made["pixel_values"], made["image_position_ids"], strict=True)):
        is_real, ours = (position >= 0).all(-1), (pictures.position_IP2[number] >= 0).all(-1)
        assert np.array_equal(pictures.position_IP2[number][ours], position[is_real])
        assert np.array_equal(pictures.pixel_values_IPD[number][ours], pixels[is_real].astype(np.float32))
    # no soft token is a target of the AR loss; what marks an image's begin and end is one
    assert not example.ar_weight_S[is_image].any()
    assert example.ar_weight_S[1 : example.images[0].start].all()


def test_every_form_of_row_gives_the_same_example(folder: Path, model: Path) -> None:
    data = (folder / "wide.png").read_bytes()
    (folder / "so wide.png").write_bytes(data)
    address = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    question, answer = "What is where?", {"role": "assistant", "content": "RcGs"}
    forms = [
        asked(picture("wide.png"), text(question)),
        asked({"type": "image", "image": str(folder / "wide.png")}, text(question)),
        asked({"type": "image_url", "image_url": {"url": address}}, text(question)),
        asked({"type": "image", "url": (folder / "so wide.png").as_uri()}, text(question)),
        asked({"type": "image", "text": None, "path": "wide.png"}, text(question)),
        asked({"type": "image"}, text(question)) | {"images": ["wide.png"]},
        {"messages": [{"role": "user", "content": question}, answer], "images": ["wide.png"]},  # TRL's
        {
            "conversations": [{"from": "human", "value": f"<image>{question}"}, {"from": "gpt", "value": "RcGs"}],
            "image": "wide.png",  # LLaVA's
        },
        {"prompt": f"<image>{question}", "completion": "RcGs", "images": ["wide.png"]},
    ]
    examples, _, _ = read(folder, model, *forms)
    first, *others = [examples[place] for place in range(len(examples))]
    assert len(others) == len(forms) - 1
    table = datasets.Dataset.from_dict(
        {"prompt": [f"<image>{question}"], "completion": ["RcGs"], "image": [{"bytes": data, "path": None}]}
    )
    table.cast_column("image", datasets.Image()).to_parquet(folder / "rows.parquet")
    from_table, _, _ = read(folder, model, file="rows.parquet")
    columns = {"prompt": "prompt", "response": "completion", "images": "picture"}
    table.rename_column("image", "picture").to_parquet(folder / "mapped.parquet")
    mapped, _, _ = read(folder, model, file="mapped.parquet", columns=columns)
    assert not mapped.told
    for other in [*others, from_table[0], mapped[0]]:
        assert other.tokens_S.tolist() == first.tokens_S.tolist()
        assert [image[:2] for image in other.images] == [image[:2] for image in first.images]
        assert other.images[0].digest == first.images[0].digest


def test_another_processor_or_another_picture_is_other_data(folder: Path, model: Path, tmp_path: Path) -> None:
    row, other = asked(picture("square.png"), text("What is where?")), tmp_path / "model"
    shutil.copytree(model, other)
    before, _, _ = read(folder, other, row)
    (written,) = [file for name in PROCESSOR_FILES if (file := other / name).is_file()]
    written.write_text(written.read_text().replace('"max_soft_tokens": 70', '"max_soft_tokens": 140'))
    after, files, _ = read(folder, other, row)
    assert after[0].images[0].tokens > before[0].images[0].tokens
    files.patches(after[0].images[0])
    digest = after.digest
    Image.new("RGB", SIZES["square.png"]).save(folder / "square.png")
    assert read(folder, other, row)[0].digest != digest
    written.unlink()
    with pytest.raises(UserError, match="has no image processor, but rows have images"):
        read(folder, other, row)


def test_turns_keep_images_in_their_documents(folder: Path, model: Path) -> None:
    turns = [asked(picture("wide.png"), text("What is where?"))["messages"], asked(text("What is where?"))["messages"]]
    turns.append(asked(picture("high.jpg"), text("What is where?"), picture("square.png"))["messages"])
    rows = [{"messages": [turn for own in turns for turn in own]}, {"messages": turns[1]}, {"messages": turns[2]}]
    examples, files, _ = read(folder, model, *rows, learn="all", max_length=400)
    assert [len(examples[place].images) for place in range(3)] == [3, 0, 2]
    made = partial(collate, Corruption(ObjectiveSection(), 0, 32), images=files)
    together = made([(examples[place], 0) for place in range(3)]).pictures
    alone = [made([(examples[place], 0)]).pictures for place in range(3)]
    assert together
    assert alone[0]
    assert alone[2]
    assert alone[1] is None
    assert together.blocks == (*alone[0].blocks, *((2, *place) for _, *place in alone[2].blocks))
    shift = len(examples[0].tokens_S) + len(examples[1].tokens_S)
    assert together.place_K.tolist() == [*alone[0].place_K.tolist(), *(alone[2].place_K + shift).tolist()]


def test_inspect_shows_an_image_as_one_box_with_its_size(folder: Path, model: Path) -> None:
    examples, _, tokenizer = read(folder, model, asked(picture("wide.png"), text("What is where?")))
    (sequence,) = sequences(examples, Corruption(ObjectiveSection(), 0, 32), tokenizer)
    (image,) = sequence.as_dict()["images"]
    start, tokens = examples[0].images[0][:2]
    file, (width, height) = str(folder / "wide.png"), SIZES["wide.png"]
    assert image == {"start": start, "tokens": tokens, "file": file, "width": width, "height": height}
    assert sequence.shown[start] == f"[image 90 x 30, {tokens} tokens: {file}]"
    assert not any(sequence.shown[start + 1 : start + tokens])
    assert len(sequence.shown) == len(sequence.roles)


def test_a_changed_picture_is_read_anew_or_named(folder: Path, model: Path) -> None:
    row = asked(picture("square.png"), text("What is where?"))
    examples, files, _ = read(folder, model, row)
    (before,) = examples[0].images
    Image.new("RGB", SIZES["wide.png"], "red").save(folder / "square.png")
    with pytest.raises(UserError, match=r"square\.png: this image has changed since the rows were read"):
        files.patches(before)
    again, files, _ = read(folder, model, row)
    assert again[0].images[0].tokens != before.tokens
    files.patches(again[0].images[0])


def bad(name: str, *said: str, row: Any = None, **data: Any) -> Any:
    return pytest.param(row or asked(picture(name), text("What is where?")), said, data, id=" ".join(said)[:40])


USER = {"role": "user", "content": "What is where?"}
ANSWER = {"role": "assistant", "content": "RcGs"}


@pytest.mark.parametrize(
    ("row", "said", "data"),
    [
        bad("gone.png", "no image", "gone.png: No such file"),
        bad("", "no image", "gone.png", row=asked({"type": "image", "image": "file:///gone.png"})),
        bad("cut.png", "cut.png is no image, or a broken one"),
        bad("empty.png", "empty.png is empty"),
        bad("text.png", "text.png is no image, or a broken one"),
        bad("frames.gif", "frames.gif has 2 frames: a still image was expected"),
        bad("\0.png", "embedded null byte"),
        bad("drawing.eps", "drawing.eps is no image, or a broken one: PNG, JPEG"),
        bad("", "messages[1] holds <image>, an image's place, though it is the assistant's",
            row={"messages": [USER, {"role": "assistant", "content": "<image>"}], "images": ["square.png"]}),
        bad("", "has 0 places for images, and the row's column has 1",
            row=asked(picture("square.png")) | {"images": ["square.png"]}),
        bad("huge.png", "pixels, at most 64 million were expected: scale it down"),
        bad("https://example.org/a.png", "would be fetched. Set data.allow_urls: true"),
        bad("data:image/png;base64,?", "is no base64"),
        bad("data:image/png,abc", "a data: address that is not base64"),
        bad("", "an image with image and path. Keep one", row=asked(picture("wide.png", image="a.png"))),
        bad("", "an image with caption, which is not read", row=asked(picture("wide.png", caption="a cat"))),
        bad("", "path is a number, expected a path", row=asked({"type": "image", "path": 3})),
        bad("", "messages[0] has an image without an address, and the row has no column", row=asked({"type": "image"})),
        bad("pipe", "pipe is no file"),
        bad("sparse.png", "sparse.png has over 256 MiB"),
        bad("~nobody-of-this-name/a.png", "~ has no meaning here"),
        bad("s3://bucket/a.png", "s3:// is not read. Give a path, file://, data: or"),
        bad("file://elsewhere/a.png", "a file of another machine: elsewhere"),
        bad("data:image/png;base64", "a data: address that is not base64"),
        bad("iVBORw0KGgo" * 200, "characters): File name too long. Base64 is written data:image/png;base64,"),
        bad("\x1b[31mred\n.png", r"\x1b[31mred\n.png: No such file"),
        bad("", "has bytes as a text. Write a path, or data:", row=asked(text("?")) | {"image": {"bytes": "iVBOR"}}),
        bad("", "image_url has alt, which is not read",
            row=asked({"type": "image_url", "image_url": {"url": "wide.png", "alt": "a cat"}})),
        bad("", "has picture, an image that messages does not read. Call it image",
            row=asked(text("?")) | {"picture": {"bytes": None, "path": "wide.png"}}),
        bad("", "has photo, an image that messages does not read", row=asked(text("<image>")) | {"photo": "a.jpeg"}),
        bad("", "has 2 places for images, and the row's column has 1",
            row=asked(text("<image><image>What is where?")) | {"images": ["wide.png"]}),
        bad("", "has image and images. Keep one", row=asked(text("?")) | {"images": ["wide.png"], "image": "wide.png"}),
        bad("", "has an image, though it is the assistant's",
            row={"messages": [USER, {"role": "assistant", "content": [picture("wide.png")]}]}),
        bad("", "messages[0] has images. An image is a part",
            row={"messages": [{**USER, "images": ["wide.png"]}, ANSWER]}),
        bad("", "holds <|image|>, which stands for an image: take it out",
            row={"messages": [{**USER, "content": "<|image|>"}, ANSWER]}),
        bad("", "stands beside running text", row={"text": "What is where?", "images": ["wide.png"]}),
    ],
)  # fmt: skip
def test_a_bad_image_is_a_line_that_names_its_row(
    folder: Path, model: Path, row: dict[str, Any], said: tuple[str, ...], data: dict[str, Any]
) -> None:
    data_of = (folder / "wide.png").read_bytes()
    (folder / "cut.png").write_bytes(data_of[: len(data_of) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    (folder / "drawing.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    first, second = Image.new("RGB", (30, 30)), Image.new("RGB", (30, 30), "red")
    first.save(folder / "frames.gif", save_all=True, append_images=[second])
    Image.new("1", (9000, 9000)).save(folder / "huge.png")
    os.mkfifo(folder / "pipe")
    with (folder / "sparse.png").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(UserError) as error:
        read(folder, model, asked(text("What is where?")), row, **data)
    head, *lines = str(error.value).splitlines()
    assert head.startswith("1 bad row of 2")
    assert len(lines) == 1
    assert lines[0].startswith(f"  {folder / 'rows.jsonl'}:2: ")
    assert all(words in lines[0] for words in said), lines[0]


def test_an_image_with_more_patches_on_a_side_than_the_tower_knows_is_refused(folder: Path, model: Path) -> None:
    _, files, _ = read(folder, model, asked(picture("square.png")))
    origin = Origin("the image", str(folder / "wide.png"))
    with pytest.raises(BadRow, match="patches, and the vision tower knows 16 on a side: crop"):
        replace(files, positions=16).find(origin)


def test_the_same_rows_in_another_folder_have_its_images(folder: Path, model: Path) -> None:
    first, _, _ = read(folder, model, asked(picture("square.png")))
    other = folder / "other"
    other.mkdir()
    for name in ("rows.jsonl", "square.png"):
        shutil.copy(folder / name, other / name)
    (other / "cache").symlink_to(folder / "cache")
    assert first[0].images[0].file == str(folder / "square.png")
    assert read(other, model)[0][0].images[0].file == str(other / "square.png")


def test_an_address_is_fetched_when_that_is_allowed_and_kept(folder: Path, model: Path, monkeypatch: Any) -> None:
    data = (folder / "wide.png").read_bytes()
    monkeypatch.setattr("ds_dgemma.data.image_files.urlopen", lambda address, timeout: io.BytesIO(data))
    examples, files, _ = read(folder, model, asked(picture("https://example.org/a.png")), allow_urls=True)
    (image,) = examples[0].images
    assert Path(image.file).read_bytes() == data
    assert isinstance(files, ImageFiles)
    assert len(files.patches(image)[0]) == 9 * image.tokens or len(files.patches(image)[0]) == 4 * image.tokens
