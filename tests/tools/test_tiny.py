"""A tiny checkpoint is an ordinary one: unmodified transformers loads all of it, generates, and decodes exactly."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

from ds_dgemma.errors import UserError
from ds_dgemma.tools.tiny import make_tiny

CORPUS = '{"question": "How many caf\\u00e9s?\\n", "answer": ["4 + 3 = 7", "seven \\ud83d\\ude00"]}\n'


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "corpus.jsonl").write_text(CORPUS * 3)
    make_tiny("sudoku4", folder / "sudoku4")
    make_tiny("text", folder / "text", text=folder / "corpus.jsonl", vocab_size=300)
    return {preset: folder / preset for preset in ("sudoku4", "text")}


@pytest.mark.parametrize("preset", ["sudoku4", "text"])
def test_transformers_finds_every_weight_and_no_other(preset: str, checkpoints: dict[str, Path]) -> None:
    loaded: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(checkpoints[preset], output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    with safe_open(checkpoints[preset] / "model.safetensors", "pt") as file:
        names = set(file.keys())
    for layer in range(model.config.text_config.num_hidden_layers):
        assert f"model.encoder.language_model.layers.{layer}.layer_scalar" in names
        assert f"model.decoder.layers.{layer}.layer_scalar" in names


@pytest.mark.parametrize("preset", ["sudoku4", "text"])
def test_generate_fills_canvases_and_pads_after_the_end(preset: str, checkpoints: dict[str, Path]) -> None:
    model: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(checkpoints[preset])
    prompt = torch.tensor([[2, 3, 5, 4], [2, 3, 6, 4]])
    torch.manual_seed(0)
    canvas = model.config.canvas_length
    output = model.generate(input_ids=prompt, max_denoising_steps=2, max_new_tokens=canvas + 1)
    new_tokens = output.sequences[:, 4:]
    assert new_tokens.shape[1] in (canvas, 2 * canvas)
    for row in new_tokens.tolist():
        ends = [place for place, token in enumerate(row) if token in (1, 4)]
        assert not ends or set(row[ends[0] + 1 :]) <= {0}


def test_any_text_is_decoded_as_it_was(checkpoints: dict[str, Path]) -> None:
    tokenizer, draw = AutoTokenizer.from_pretrained(checkpoints["text"]), random.Random(0)
    ranges = [(0, 0x80), (0x80, 0x800), (0x2000, 0x2070), (0x3000, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    texts = ["".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(30)) for _ in range(200)]
    texts += ["", " ", "\n\n \r\n\t", " a  , don't . ", "a<turn|>b <bos>", "é e\u0301", "".join(map(chr, range(256)))]
    for text in texts:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_an_answer_never_changes_the_tokens_of_its_prompt(checkpoints: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["text"])
    user = {"role": "user", "content": "4 + 3\n"}
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    for answer in ("7", "\n7", "\n\n\n", "  7", "\t", "", "\r\n"):
        turns = [user, {"role": "assistant", "content": answer}]
        assert tokenizer.apply_chat_template(turns, return_dict=False)[: len(prompt)] == prompt


def test_turns_are_written_as_gemma_does(checkpoints: dict[str, Path]) -> None:
    roles = ("system", "user", "assistant", "user")
    turns = [{"role": role, "content": content} for role, content in zip(roles, "1234", strict=True)]
    expected = (
        "<bos><|turn>system\n1<turn|>\n<|turn>user\n2<turn|>\n<|turn>model\n3<turn|>\n"
        "<|turn>user\n4<turn|>\n<|turn>model\n"
    )
    for preset, text in (("text", expected), ("sudoku4", expected.replace("\n", ""))):
        tokenizer = AutoTokenizer.from_pretrained(checkpoints[preset])
        assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == text


def test_a_sudoku_character_is_one_token_and_the_image_ids_are_the_last(checkpoints: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["sudoku4"])
    cells = ".123456789ABCDEFGHI"
    ids = tokenizer(cells, add_special_tokens=False)["input_ids"]
    assert len(set(ids)) == len(cells)
    assert tokenizer.decode(ids) == cells
    puzzle = [{"role": "user", "content": "12..34.." * 2}]
    prompt = tokenizer.apply_chat_template(puzzle, add_generation_prompt=True, return_dict=False)
    assert len(prompt) == len("BTu") + 16 + len("/Tm")
    assert tokenizer.unk_token_id not in prompt
    config: Any = DiffusionGemmaConfig.from_pretrained(checkpoints["sudoku4"])
    assert config.text_config.vocab_size == len(tokenizer) == 32
    assert sorted([config.boi_token_id, config.eoi_token_id, config.image_token_id]) == [29, 30, 31]


def test_the_seed_decides_the_weights_and_force_replaces_them(tmp_path: Path) -> None:
    weights = []
    for seed in (1, 1, 2):
        make_tiny("sudoku4", tmp_path / "model", seed=seed, force=True)
        weights.append((tmp_path / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_what_cannot_be_made_is_refused_and_leaves_nothing(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    used = shutil.copytree(checkpoints["sudoku4"], tmp_path / "used")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"a": "b"}\n{"a": \n')
    new = tmp_path / "new"
    refused = [
        (("sudoku4", used), {}, "already exists"),
        (("sudoku4", broken), {}, "already exists"),
        (("sudoku4", tmp_path), {"force": True}, "is no checkpoint"),
        (("sudoku4", broken / "below"), {}, "cannot write"),
        (("sudoku4", new), {"vocab_size": 64}, "--vocab-size"),
        (("text", new), {}, "needs --text"),
        (("text", new), {"text": broken, "vocab_size": 100}, "at least 273"),
        (("text", new), {"text": broken}, r"broken.jsonl:2: broken JSON"),
        (("text", new), {"text": tmp_path / "absent"}, "cannot be read"),
    ]
    for args, options, message in refused:
        with pytest.raises(UserError, match=message):
            make_tiny(*args, **options)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["broken.jsonl", "used"]
