"""What a user can get wrong, and the words that the message must have: a table for `test_bad_input.py`.

A case breaks a folder that holds `run.yaml`, `model/` and `train.jsonl`, and returns the `--set` overrides to start
with.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

Break = Callable[[Path], list[str]]
QUESTION = {"role": "user", "content": "1" * 16}
ANSWER = {"role": "assistant", "content": "1" * 16}


def setting(*overrides: str) -> Break:
    """Start with these overrides; `{folder}` is filled in."""
    return lambda folder: [override.replace("{folder}", str(folder)) for override in overrides]


def config(change: bytes | Callable[[bytes], bytes]) -> Break:
    """Another run.yaml."""

    def break_it(folder: Path) -> list[str]:
        file = folder / "run.yaml"
        file.write_bytes(change if isinstance(change, bytes) else change(file.read_bytes()))
        return []

    return break_it


def deepspeed(content: bytes | dict) -> Break:
    """Another DeepSpeed JSON."""

    def break_it(folder: Path) -> list[str]:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / "deepspeed.json").write_bytes(raw)
        return [f"deepspeed={folder}/deepspeed.json"]

    return break_it


def row(line: bytes | dict, *more: str) -> Break:
    """The third line of the data."""

    def break_it(folder: Path) -> list[str]:
        lines = (folder / "train.jsonl").read_bytes().splitlines()
        lines[2] = line if isinstance(line, bytes) else json.dumps(line).encode()
        (folder / "broken.jsonl").write_bytes(b"\n".join(lines))
        return [f"data.train={folder}/broken.jsonl", *more]

    return break_it


def data(content: bytes | Callable[[bytes], bytes], *more: str) -> Break:
    """Other data as a whole."""

    def break_it(folder: Path) -> list[str]:
        whole = content if isinstance(content, bytes) else content((folder / "train.jsonl").read_bytes())
        (folder / "broken.jsonl").write_bytes(whole)
        return [f"data.train={folder}/broken.jsonl", *more]

    return break_it


def spec(**changes: Any) -> Break:
    """Another config.json of the model; a dict changes what is in it."""

    def break_it(folder: Path) -> list[str]:
        file = folder / "model/config.json"
        settings = json.loads(file.read_text())
        for key, value in changes.items():
            settings[key] = {**settings.get(key, {}), **value} if isinstance(value, dict) else value
        file.write_text(json.dumps(settings))
        return []

    return break_it


def model_file(name: str, content: bytes | None) -> Break:
    """Another file beside the model, or one that is not there."""

    def break_it(folder: Path) -> list[str]:
        file = folder / "model" / name
        file.unlink() if content is None else file.write_bytes(content)
        return []

    return break_it


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    """Other weights."""

    def break_it(folder: Path) -> list[str]:
        file = folder / "model/model.safetensors"
        stored = load_file(file)
        change(stored)
        save_file(stored, file, metadata={"format": "pt"})
        return []

    return break_it


def index(*weight_map: tuple[str, str]) -> Break:
    """An index for the weights."""
    return raw_index(json.dumps({"metadata": {}, "weight_map": dict(weight_map)}).encode())


def raw_index(content: bytes) -> Break:
    """An index of this content, and the weights under a shard's name: the single file would go before it."""

    def break_it(folder: Path) -> list[str]:
        (folder / "model/model.safetensors").rename(folder / "model/model-00001-of-00002.safetensors")
        return model_file("model.safetensors.index.json", content)(folder)

    return break_it


def no_tokenizer(folder: Path) -> list[str]:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).unlink()
    return []


def no_eos(folder: Path) -> list[str]:
    file = folder / "model/tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in settings.items() if key != "eos_token"}))
    return []


def truncated_weights(folder: Path) -> list[str]:
    weights = folder / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return []


def only_pickle(folder: Path) -> list[str]:
    torch.save(load_file(folder / "model/model.safetensors"), folder / "model/pytorch_model.bin")
    (folder / "model/model.safetensors").unlink()
    return []


def foreign_metrics(folder: Path) -> list[str]:
    (folder / "run").mkdir()
    (folder / "run/metrics.jsonl").write_text('{"step": 1}\n')
    return []


def another_config(folder: Path) -> list[str]:
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    settings["optimizer"]["lr"] = 0.5
    (folder / "run").mkdir()
    (folder / "run/config.yaml").write_text(yaml.safe_dump(settings))
    return []


def used_directory(folder: Path) -> list[str]:
    (folder / "run").mkdir()
    shutil.copy(folder / "run.yaml", folder / "run/config.yaml")
    return ["run.resume=never"]


def lost_checkpoint(folder: Path) -> list[str]:
    (folder / "run/checkpoints/step-000010").mkdir(parents=True)
    shutil.copy(folder / "run.yaml", folder / "run/config.yaml")
    return []


def a_file_in_the_way(folder: Path) -> list[str]:
    (folder / "file").write_text("")
    return [f"run.dir={folder}/file/run"]


def chat(*turns: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(turns)}


NORM = "model.decoder.norm.weight"

CONFIG: dict[str, tuple[Break, list[str]]] = {
    "unknown key": (setting("optimizer.lear=1"), ["optimizer.lear", "Did you mean optimizer.lr?"]),
    "unknown section": (config(lambda yaml: yaml + b"\noptimiser: {lr: 1}\n"), ["optimiser", "optimizer?"]),
    "key set twice": (config(lambda yaml: yaml + b"\nseed: 1\nseed: 2\n"), ["seed", "set twice"]),
    "config of no YAML": (config(b"run: [\n"), ["run.yaml"]),
    "config that is a list": (config(b"- run\n"), ["run.yaml"]),
    "empty config": (config(b""), ["run.yaml"]),
    "config with a tab": (config(b"run:\n\tdir: x\n"), ["run.yaml"]),
    "config of another encoding": (config(lambda yaml: yaml.decode().encode("utf-16")), ["run.yaml", "UTF-8"]),
    "config with a NUL": (config(lambda yaml: yaml + b"# \0\n"), ["run.yaml"]),
    "required setting missing": (config(b"run: {dir: x}\n"), ["4 problems", "deepspeed  is required"]),
    "word for a number": (setting("train.max_steps=many"), ["train.max_steps", "a whole number"]),
    "number below its range": (setting("optimizer.lr=-1"), ["optimizer.lr", "-1"]),
    "not a number": (setting("optimizer.lr=.nan"), ["optimizer.lr"]),
    "rank beyond every matrix": (setting(f"lora={{r: {10**10}}}"), ["lora.r = 10000000000", "65536"]),
    "length beyond every memory": (setting(f"data.max_length={10**11}"), ["data.max_length", "10000000"]),
    "number of many digits": (setting("seed=" + "9" * 5000), ["seed", "a whole number"]),
    "endless time-out": (setting("parallel.collective_timeout_minutes=1e300"), ["collective_timeout_minutes"]),
    "floor above the peak": (setting("optimizer.min_lr=1"), ["min_lr 1.0 is above lr"]),
    "unknown choice": (setting("train.precision=fp16"), ["train.precision", "bf16 or fp32"]),
    "empty path": (setting("run.dir="), ["run.dir"]),
    "override without a value": (setting("optimizer.lr"), ["optimizer.lr", "key=value"]),
    "batch that does not divide": (setting("train.micro_batch_size=3"), ["train.global_batch_size"]),
    "experts that do not divide": (
        setting("parallel.expert_parallel_size=16"),
        ["parallel.expert_parallel_size", "16"],
    ),
    "validation without data": (setting("validation.every=5"), ["validation.every", "held-out data"]),
    "frozen parts beside LoRA": (setting("lora={}", "model.freeze=['*.experts.*']"), ["model.freeze", "lora"]),
    "adapters on nothing": (setting("lora={target_modules: [nose_proj]}"), ["target_modules", "nose_proj"]),
    "adapter that is not there": (setting("lora={path: {folder}/none}"), ["none", "cannot be read"]),
    "pattern that freezes nothing": (setting("model.freeze=['*.nose.*']"), ["model.freeze", "matches no name"]),
    "pattern that freezes everything": (setting("model.freeze=['*']"), ["freezes every parameter"]),
    "group that gets nothing": (
        setting("optimizer.groups=[{match: '*.nose.*', lr: 1.0}]"),
        ["optimizer.groups.0.match"],
    ),
    "attention kernel without a GPU": (
        setting("model.attention=ffpa"),
        ["model.attention = ffpa", "needs a CUDA device"],
    ),
    "balance of frozen routers": (setting("objective.router_balance_weight=0.1"), ["router_balance_weight"]),
    "DeepSpeed JSON missing": (setting("deepspeed={folder}/none.json"), ["none.json", "no such file"]),
    "DeepSpeed JSON broken": (deepspeed(b'{"zero_optimization": '), ["deepspeed.json"]),
    "DeepSpeed JSON of another batch": (
        deepspeed({"zero_optimization": {"stage": 3}, "train_batch_size": 7}),
        ["train_batch_size", "7"],
    ),
    "DeepSpeed stage 0": (deepspeed({"zero_optimization": {"stage": 0}}), ["stage"]),
    "DeepSpeed key misspelt": (
        deepspeed({"zero_optimization": {"stage": 3}, "steps_per_prnt": 1}),
        ["steps_per_prnt", "Did you mean"],
    ),
    "sequence parallelism": (
        deepspeed({"zero_optimization": {"stage": 3}, "sequence_parallel_size": 2}),
        ["sequence_parallel_size"],
    ),
}

DATA: dict[str, tuple[Break, list[str]]] = {
    "missing file": (setting("data.train={folder}/absent.jsonl"), ["absent.jsonl"]),
    "file of another kind": (setting("data.train={folder}/model/model.safetensors"), ["ends in none of .jsonl"]),
    "no example": (data(b""), ["broken.jsonl is empty"]),
    "broken line": (row(b'{"messages": ['), ["broken.jsonl:3", "broken JSON"]),
    "line of another encoding": (row(b'{"messages": "\xff"}'), ["broken.jsonl:3", "not UTF-8"]),
    "file of another encoding": (data(lambda raw: raw.decode().encode("utf-16")), ["broken.jsonl:1"]),
    "NUL": (row(b'{"messages": "\0"}'), ["broken.jsonl:3", "NUL byte"]),
    "huge line": (row(b'{"messages": ' + b"[" * 2_000_000), ["broken.jsonl:3", "broken JSON"]),
    "array for lines": (row(b'[{"messages": []}]'), ["broken.jsonl:3", "jq -c"]),
    "empty messages": (row({"messages": []}), ["broken.jsonl:3", "messages is empty"]),
    "other columns": (row({"question": "a", "answer": "b"}), ["broken.jsonl:3", "question, answer"]),
    "column that is not there": (
        setting("data.columns={prompt: question, response: answer}"),
        ["train.jsonl:1", "no column question"],
    ),
    "wrong role": (row(chat(QUESTION, {**ANSWER, "role": "model"})), ["broken.jsonl:3", "Use assistant"]),
    "no assistant turn": (row(chat(QUESTION)), ["broken.jsonl:3", "no assistant turn"]),
    "question last": (row(chat(QUESTION, ANSWER, QUESTION)), ["broken.jsonl:3", "last message is from user"]),
    "empty response": (row(chat(QUESTION, {**ANSWER, "content": " "})), ["broken.jsonl:3", "is empty"]),
    "number for a content": (row(chat(QUESTION, {**ANSWER, "content": 3})), ["broken.jsonl:3", "is a number"]),
    "half a surrogate": (row(chat({**QUESTION, "content": "\ud800"}, ANSWER)), ["broken.jsonl:3", "surrogate"]),
    "tool calls": (row(chat(QUESTION, {**ANSWER, "tool_calls": [1]})), ["broken.jsonl:3", "tool_calls"]),
    "images": (
        row({**chat(QUESTION, ANSWER), "images": ["a.png"]}),
        ["broken.jsonl:3", "no image", "a.png: No such file"],
    ),
    "an image's place": (
        row(chat({**QUESTION, "content": "<|image|>"}, ANSWER)),
        ["broken.jsonl:3: messages[0].content holds <|image|>", "stands for an image: take it out"],
    ),
    "response over the limit": (
        setting("data.max_length=20", "data.over_length=error"),
        ["train.jsonl", "too long", "over_length is error"],
    ),
    "nothing within the limit": (setting("data.max_length=20"), ["no example fits data.max_length 20"]),
}

MODEL: dict[str, tuple[Break, list[str]]] = {
    "missing model": (setting("model.path={folder}/absent"), ["model.path", "absent"]),
    "home for a model": (setting("model.path=~/absent"), ["~ is not expanded"]),
    "revision of a directory": (setting("model.revision=main"), ["revision main", "only hub ids have revisions"]),
    "file for a model": (setting("model.path={folder}/run.yaml"), ["model.path", "run.yaml"]),
    "no config.json": (model_file("config.json", None), ["model.path", "config.json"]),
    "broken config.json": (model_file("config.json", b"{"), ["model.path"]),
    "wrong type in config.json": (spec(text_config={"hidden_size": "large"}), ["model.path", "could not be read"]),
    "another architecture": (model_file("config.json", b'{"model_type": "gemma2"}'), ["gemma2 checkpoint"]),
    "no canvas": (spec(canvas_length=None), ["canvas_length None"]),
    "negative size": (
        spec(text_config={"hidden_size": -128}),
        ["hidden_size = -128 in layer 0, a whole number from 1"],
    ),
    "window of one": (
        spec(text_config={"sliding_window": 1}),
        ["sliding_window = 1 in layer 0, a whole number from 2"],
    ),
    "more experts for a token than there are": (
        spec(text_config={"top_k_experts": 9}),
        ["top_k_experts = 9, at most num_experts, 8"],
    ),
    "padding outside the vocabulary": (
        spec(text_config={"pad_token_id": 99}),
        ["pad_token_id = 99, from 0 to vocab_size - 1, 31"],
    ),
    "weights said to be quantized": (spec(quantization_config={"quant_method": "fp8"}), ["has quantization_config"]),
    "weights elsewhere": (spec(transformers_weights="other.safetensors"), ["has transformers_weights"]),
    "weights that are not shared": (spec(tie_word_embeddings=False), ["tie_word_embeddings false"]),
    "config.json of another model": (spec(text_config={"hidden_size": 64}), ["shape"]),
    "layers of no known kind": (spec(text_config={"layer_types": ["nose"] * 4}), ["model.path"]),
    "layers that do not fit": (
        spec(text_config={"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}),
        ["no model can be built from config.json", "not homogeneous"],
    ),
    "no tokenizer": (no_tokenizer, ["no tokenizer", "tokenizer.json"]),
    "broken tokenizer": (model_file("tokenizer.json", b"{"), ["no usable tokenizer"]),
    "no chat template": (model_file("chat_template.jinja", None), ["chat template"]),
    "template with unknown tokens": (
        model_file("chat_template.jinja", b"{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"),
        ["train.jsonl:1", "<unk>"],
    ),
    "template that refuses": (
        model_file("chat_template.jinja", b"{{ raise_exception('roles must alternate') }}"),
        ["train.jsonl:1: ", "roles must alternate"],
    ),
    "tokenizer of another model": (spec(text_config={"vocab_size": 5}), ["tokens, the model's embedding 5"]),
    "no EOS": (no_eos, ["no EOS token"]),
    "missing shard": (index((NORM, "model-00002-of-00002.safetensors")), ["model-00002-of-00002.safetensors"]),
    "index that leaves its directory": (index((NORM, "../other.safetensors")), ["../other.safetensors"]),
    "broken index": (raw_index(b"{"), ["model.safetensors.index.json"]),
    "truncated weights": (truncated_weights, ["model.safetensors", "cannot be read"]),
    "weights to be unpickled": (only_pickle, ["pytorch_model.bin", "safetensors"]),
    "missing tensor": (tensors(lambda stored: stored.pop(NORM)), [NORM, "missing"]),
    "wrong shape": (tensors(lambda stored: stored.update({NORM: torch.ones(3)})), [NORM, "shape"]),
    "quantized tensor": (
        tensors(lambda stored: stored.update({NORM: stored[NORM].to(torch.int8)})),
        [NORM, "I8"],
    ),
    "tensor too many": (
        tensors(lambda stored: stored.update({"model.decoder.nose.weight": torch.ones(3)})),
        ["model.decoder.nose.weight"],
    ),
}

RUN: dict[str, tuple[Break, list[str]]] = {
    "somebody's metrics": (foreign_metrics, ["run.dir", "not a run of ours"]),
    "another run's directory": (another_config, ["optimizer.lr", "another config"]),
    "used directory": (used_directory, ["run.resume is never"]),
    "a file in the way": (a_file_in_the_way, ["run.dir", "cannot be used", "file"]),
    "no whole checkpoint": (lost_checkpoint, ["step-000010", "state.json"]),
    "run in the model's directory": (setting("run.dir={folder}/model/run"), ["run.dir", "the model's own directory"]),
    "named checkpoint missing": (setting("run.resume={folder}/step-000003"), ["step-000003", "does not exist"]),
}

MISTAKES = {**CONFIG, **DATA, **MODEL, **RUN}
