"""A checkpoint is read by ranges as if it were sliced whole, and a broken one is named in one message."""

import json
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DiffusionGemmaForBlockDiffusion

from ds_dgemma.checkpoint.export import merge_adapter
from ds_dgemma.checkpoint.load import check_places, materialise, plain
from ds_dgemma.checkpoint.weights import INDEX, SINGLE, WeightReader
from ds_dgemma.errors import UserError
from ds_dgemma.model.build import build_stack
from ds_dgemma.model.names import Place, places_of
from ds_dgemma.model.spec import read_spec
from ds_dgemma.model.stack import DiffusionGemmaStack
from tests.reference.fixtures import Case, make_model


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in one file."""
    folder = tmp_path_factory.mktemp("single")
    make_model(Case(layers="SF")).save_pretrained(folder)
    assert (folder / SINGLE).is_file()
    return folder


@pytest.fixture
def sharded(single: Path, tmp_path: Path) -> Path:
    """The same in three shards under an index, free to be broken."""
    tensors = load_file(single / SINGLE)
    weight_map = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    shutil.copy(single / "config.json", tmp_path)
    return tmp_path


def outline(folder: Path) -> DiffusionGemmaStack:
    return build_stack(read_spec(str(folder)), train_router=True)


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def told(folder: Path, **options) -> str:
    """The message of the error that opening the checkpoint raises."""
    stack = outline(folder)
    with pytest.raises(UserError) as caught:
        check_places(stack, places_of(stack), WeightReader(folder), **options)
    return str(caught.value)


@pytest.mark.parametrize("seed", range(25))
def test_any_range_of_any_part_equals_slicing(seed: int, tmp_path: Path):
    draw = np.random.default_rng(seed)
    shape = tuple(int(size) for size in draw.integers(1, 7, size=draw.integers(0, 5)))
    tensor = torch.from_numpy(draw.standard_normal(shape))
    save_file({"t": tensor}, tmp_path / SINGLE)
    reader = WeightReader(tmp_path)

    def bounds(size: int) -> tuple[int, int]:
        first, last = sorted(draw.choice(size + 1, size=2, replace=False).tolist())
        return first, last

    places = [(Place("t"), tensor)]
    if len(shape) >= 2:
        experts, rows = bounds(shape[0]), bounds(shape[1])
        places.append((Place("t", experts, rows), tensor[slice(*experts), slice(*rows)]))
    for place, part in places:
        whole = part.flatten()
        for start, stop in ((0, len(whole)), (0, 0), *draw.integers(0, len(whole) + 1, size=(20, 2)).tolist()):
            start, stop = min(start, stop), max(start, stop)
            room = torch.full((stop - start + 1,), torch.nan, dtype=torch.float32)
            reader.read_into(room[:-1], place, start, stop)
            assert torch.equal(room[:-1], whole[start:stop].float())
            assert room[-1].isnan()  # nothing written behind


def test_a_range_larger_than_a_piece_is_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("ds_dgemma.checkpoint.weights.PIECE", 7)
    tensor = torch.arange(5 * 6 * 4, dtype=torch.float32).view(5, 6, 4)
    save_file({"t": tensor}, tmp_path / SINGLE)
    room = torch.empty(45)
    WeightReader(tmp_path).read_into(room, Place("t", (1, 4), (2, 6)), 3, 48)
    assert torch.equal(room, tensor[1:4, 2:6].flatten()[3:48])


def test_a_range_reads_no_more_bytes_than_it_holds(tmp_path: Path):
    shape = (5, 6, 7)
    save_file({"t": torch.arange(prod(shape), dtype=torch.float32).view(shape)}, tmp_path / SINGLE)
    reader = WeightReader(tmp_path)
    reader.read_into(torch.empty(100), Place("t"), 50, 150)
    assert reader.bytes_read == 400


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    stack = outline(folder)
    reader = WeightReader(folder)
    materialise(stack, reader, check_places(stack, places_of(stack), reader), plain(torch.float32, "cpu"), device="cpu")
    return dict(stack.state_dict())


def test_shards_under_an_index_give_what_one_file_gives(single: Path, sharded: Path):
    expected = load_file(single / SINGLE)
    one, many = read_all(single), read_all(sharded)
    torch.testing.assert_close(many, one, rtol=0, atol=0)
    for name in ("layers.0.experts.gate_up_proj", "layers.1.self_attn.q_proj.weight", "layers.0.layer_scalar"):
        assert torch.equal(one[name], expected["model.decoder." + name])
    scalar = expected["model.encoder.language_model.layers.1.layer_scalar"]
    assert torch.equal(one["layers.1.encoder_layer_scalar"], scalar)


def test_of_a_file_and_an_index_that_are_both_there_the_file_is_read_as_transformers_reads_it(single, sharded):
    shutil.copy(single / SINGLE, sharded)
    name = "model.decoder.norm.weight"
    rewrite(sharded / SINGLE, lambda tensors: tensors[name].add_(1))
    loaded: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(sharded, dtype=torch.float32)
    assert torch.equal(WeightReader(sharded).read(name), loaded.model.decoder.norm.weight)


def test_every_parameter_is_given_memory_and_keeps_whether_it_trains(single: Path):
    stack = build_stack(read_spec(str(single)))
    reader = WeightReader(single)
    materialise(
        stack, reader, check_places(stack, places_of(stack), reader), plain(torch.bfloat16, "cpu"), device="cpu"
    )
    assert not any(tensor.is_meta for tensor in [*stack.parameters(), *stack.buffers()])
    assert {p.dtype for p in stack.parameters()} == {torch.bfloat16}
    frozen = {name for name, p in stack.named_parameters() if not p.requires_grad}
    assert frozen == {
        f"layers.{i}.router.{part}" for i in (0, 1) for part in ("proj.weight", "scale", "per_expert_scale")
    }


def test_a_directory_without_weights_says_so(tmp_path: Path):
    with pytest.raises(UserError, match="holds no weights"):
        WeightReader(tmp_path)


BROKEN_INDEXES = [
    "{",
    "[]",
    "{}",
    "\x80",
    '{"weight_map": ["a"]}',
    '{"weight_map": {"t": 5}}',
]


@pytest.mark.parametrize("text", BROKEN_INDEXES)
def test_a_broken_index_is_named(sharded: Path, text: str):
    (sharded / INDEX).write_text(text, encoding="latin-1")
    message = told(sharded)
    assert str(sharded / INDEX) in message
    assert "broken" in message


def test_a_missing_shard_is_named(sharded: Path):
    (sharded / "model-1.safetensors").unlink()
    assert "model-1.safetensors" in told(sharded)


@pytest.mark.parametrize("name", ["../model-1.safetensors", "/etc/passwd", "sub/model-1.safetensors"])
def test_an_index_that_leads_out_of_the_directory_is_refused(sharded: Path, name: str):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.decoder.norm.weight"] = name
    (sharded / INDEX).write_text(json.dumps(index))
    message = told(sharded)
    assert repr(name) in message
    assert "Refused" in message


@pytest.mark.parametrize("keep", [0, 5, 200, -10], ids=["empty", "in the length", "in the header", "in the data"])
@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_a_truncated_file_is_named(layout: str, keep: int, single: Path, sharded: Path, tmp_path_factory):
    folder = sharded
    if layout == "single":
        folder = tmp_path_factory.mktemp("cut")
        shutil.copytree(single, folder, dirs_exist_ok=True)
    file = folder / (SINGLE if layout == "single" else "model-2.safetensors")
    file.write_bytes(file.read_bytes()[:keep])
    message = told(folder)
    assert str(file) in message
    assert "cannot be read" in message


def test_a_tensor_that_the_index_places_in_the_wrong_shard_is_named(sharded: Path):
    index = json.loads((sharded / INDEX).read_text())
    name = "model.decoder.norm.weight"
    index["weight_map"][name] = next(
        file for file in set(index["weight_map"].values()) if file != index["weight_map"][name]
    )
    (sharded / INDEX).write_text(json.dumps(index))
    message = told(sharded)
    assert name in message
    assert index["weight_map"][name] in message


def test_every_missing_tensor_and_wrong_shape_is_named_at_once(single: Path, tmp_path: Path):
    shutil.copytree(single, tmp_path, dirs_exist_ok=True)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.decoder.norm.weight"], tensors["model.decoder.layers.0.experts.down_proj"]
        name = "model.decoder.layers.1.self_attn.q_proj.weight"
        tensors[name] = tensors[name][:-1].contiguous()

    rewrite(tmp_path / SINGLE, change)
    message = told(tmp_path)
    assert "3 problems" in message
    assert "model.decoder.norm.weight is missing, shape (48,) was expected" in message
    assert "model.decoder.layers.0.experts.down_proj is missing, shape (4, 48, 24) was expected" in message
    assert "model.decoder.layers.1.self_attn.q_proj.weight has shape (63, 48), (64, 48) was expected" in message


def test_tensors_of_another_model_and_quantized_ones_are_named(single: Path, tmp_path: Path):
    shutil.copytree(single, tmp_path, dirs_exist_ok=True)
    vision = "model.encoder.vision_tower.patch_embedder.input_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.decoder.layers.2.input_layernorm.weight"] = torch.ones(48)  # a third layer
        name = "model.decoder.layers.0.experts.gate_up_proj"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"].clone()  # tied: of no account
        tensors[vision] = tensors[vision].to(torch.int8)  # never read by training, but by the export

    rewrite(tmp_path / SINGLE, change)
    message = told(tmp_path)
    assert "3 problems" in message
    assert "model.decoder.layers.2.input_layernorm.weight, shape (48,), has no place" in message
    assert "model.decoder.layers.0.experts.gate_up_proj of shape (4, 48, 48) is F8_E4M3; BF16" in message
    assert f"{vision} of shape (16, 48) is I8; BF16" in message


def test_copies_of_tied_weights_must_be_copies(single: Path, tmp_path: Path):
    shutil.copytree(single, tmp_path, dirs_exist_ok=True)
    embedding, norm = "model.decoder.embed_tokens.weight", "model.encoder.language_model.norm.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors[embedding][:-1].clone()
        tensors[norm] = tensors["model.decoder.norm.weight"].clone()
        tensors[norm][-1] += 1
        name = "layers.0.experts.down_proj"  # a true copy
        tensors["model.encoder.language_model." + name] = tensors["model.decoder." + name].clone()
        tensors["model.encoder.language_model.layers.2.input_layernorm.weight"] = torch.ones(48)

    rewrite(tmp_path / SINGLE, change)
    message = told(tmp_path)
    assert "3 problems" in message
    assert f"lm_head.weight has shape (95, 48), (96, 48) was expected: it is tied to {embedding}" in message
    assert f"{norm} has other values than model.decoder.norm.weight" in message
    assert "model.encoder.language_model.layers.2.input_layernorm.weight, shape (48,), has no place" in message


def test_a_vision_tower_that_is_not_whole_is_refused_before_training_and_merging(single: Path, tmp_path: Path):
    shutil.copytree(single, tmp_path, dirs_exist_ok=True)
    layer = "model.encoder.vision_tower.encoder.layers.0"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{layer}.input_layernorm.weight"]
        tensors[f"{layer}.self_attn.q_norm.weight"] = torch.ones(9)

    rewrite(tmp_path / SINGLE, change)
    message = told(tmp_path)
    assert "2 problems" in message
    assert f"{layer}.input_layernorm.weight is missing, shape (16,) was expected" in message
    assert f"{layer}.self_attn.q_norm.weight has shape (9,), (8,) was expected" in message
    with pytest.raises(UserError) as merging:
        merge_adapter(str(tmp_path), tmp_path / "no-adapter", tmp_path / "out")
    assert str(merging.value) == message


def test_missing_encoder_scalars_are_refused_or_copied_from_the_decoder(single: Path, tmp_path: Path):
    shutil.copytree(single, tmp_path, dirs_exist_ok=True)
    rewrite(tmp_path / SINGLE, lambda t: t.pop("model.encoder.language_model.layers.1.layer_scalar"))
    message = told(tmp_path)
    assert "model.encoder.language_model.layers.1.layer_scalar is missing" in message
    assert "missing_encoder_scalars: copy_decoder" in message

    stack, reader = outline(tmp_path), WeightReader(tmp_path)
    places = check_places(stack, places_of(stack), reader, copy_decoder_scalars=True)
    materialise(stack, reader, places, plain(torch.float32, "cpu"), device="cpu")
    buffers = dict(stack.named_buffers())
    assert torch.equal(buffers["layers.1.encoder_layer_scalar"], buffers["layers.1.layer_scalar"])
    assert not torch.equal(buffers["layers.0.encoder_layer_scalar"], buffers["layers.0.layer_scalar"])
