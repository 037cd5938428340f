"""What comes with a model or an adapter is data: none of it is run, and none of it names files elsewhere."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DiffusionGemmaConfig

from ds_dgemma.checkpoint.adapter import AdapterReader
from ds_dgemma.checkpoint.weights import INDEX, SINGLE, WeightReader
from ds_dgemma.data.tokenizer import load_tokenizer
from ds_dgemma.errors import UserError
from ds_dgemma.evaluation.open_model import Source, find_model, load_model
from ds_dgemma.model.spec import read_spec


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.fixture
def model(sudoku_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sudoku_run.parent / "model", tmp_path / "model"))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """There when somebody's code has run."""
    return tmp_path / "trace"


def test_pickled_weights_are_refused_with_a_way_out(model, trace):
    (model / SINGLE).unlink()
    torch.save({"weight": Payload(trace)}, model / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is pickled.*save_pretrained"):
        WeightReader(model)
    with pytest.raises(UserError, match="is pickled, which can run code"):
        load_model(find_model(Source(str(model)), {}))
    assert not trace.exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(model / "pytorch_model.bin", weights_only=True)
    torch.load(model / "pytorch_model.bin", weights_only=False)
    assert trace.exists()  # it would have


def test_a_pickled_adapter_is_refused_with_a_way_out(trace, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    torch.save({"weight": Payload(trace)}, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.bin is pickled.*save_file"):
        AdapterReader(tmp_path, {})
    assert not trace.exists()


def bring_code(model: Path, trace: Path, file: str, **settings: Any) -> None:
    """Let a configuration point to code beside it."""
    (model / "own.py").write_text(f"open({str(trace)!r}, 'w')\nclass Own: pass\n")
    kinds = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    pointers: dict[str, Any] = dict.fromkeys(kinds, "own.Own") | {"AutoTokenizer": ["own.Own", "own.Own"]}
    content = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps({**content, "auto_map": pointers, **settings}))


def test_code_beside_a_model_is_not_run(model, trace):
    bring_code(model, trace, "config.json")
    bring_code(model, trace, "tokenizer_config.json")
    assert isinstance(read_spec(str(model)), DiffusionGemmaConfig)
    assert len(load_tokenizer(model, 1000)) > 1
    load_model(find_model(Source(str(model)), {}))
    assert not trace.exists()


def test_a_model_that_needs_code_of_its_own_is_refused_without_a_question(model, trace):
    bring_code(model, trace, "config.json", model_type="own")
    bring_code(model, trace, "tokenizer_config.json", tokenizer_class="Own")
    with pytest.raises(UserError, match="is a own checkpoint"):
        read_spec(str(model))
    with pytest.raises(UserError, match="no usable tokenizer"):
        load_tokenizer(model, 1000)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "{elsewhere}", "sub/x.safetensors", "..", "", "a\0b"])
def test_an_index_names_only_files_beside_it(name, model, tmp_path):
    elsewhere = shutil.copy(model / SINGLE, tmp_path / "elsewhere.safetensors")
    (model / "sub").mkdir()
    (model / SINGLE).rename(model / "sub/x.safetensors")
    (model / INDEX).write_text(json.dumps({"weight_map": {"a": name.format(elsewhere=elsewhere)}}))
    with pytest.raises(UserError, match=r"Refused|lacks the shard"):
        WeightReader(model)
