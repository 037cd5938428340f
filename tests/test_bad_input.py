"""A user's mistake: one clear message, exit code 2 on every rank, no trace, nothing left hanging, nothing
overwritten.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from ds_dgemma.config_file import load_config
from ds_dgemma.engine.ranks import RankLayout
from ds_dgemma.errors import UserError
from ds_dgemma.run_directory import claim, find_start
from ds_dgemma.train import prepare
from tests.training import start_ranks


def broken_line(folder: Path) -> list[str]:
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[2] = lines[2][:-5]
    (folder / "broken.jsonl").write_text("\n".join(lines))
    return [f"data.train={folder}/broken.jsonl"]


def empty_messages(folder: Path) -> list[str]:
    (folder / "broken.jsonl").write_text('{"messages": []}\n')
    return [f"data.train={folder}/broken.jsonl"]


def no_assistant(folder: Path) -> list[str]:
    (folder / "broken.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    return [f"data.train={folder}/broken.jsonl"]


def image_in_the_text(folder: Path) -> list[str]:
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[4] = lines[4].replace('"content": "', '"content": "<|image|>', 1)
    (folder / "broken.jsonl").write_text("\n".join(lines))
    return [f"data.train={folder}/broken.jsonl"]


def no_template(folder: Path) -> list[str]:
    (folder / "model/chat_template.jinja").unlink()
    return []


def no_tokenizer(folder: Path) -> list[str]:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).unlink()
    return []


def wrong_type_in_model_config(folder: Path) -> list[str]:
    config = json.loads((folder / "model/config.json").read_text())
    config["text_config"]["hidden_size"] = "large"
    (folder / "model/config.json").write_text(json.dumps(config))
    return []


def no_canvas(folder: Path) -> list[str]:
    config = json.loads((folder / "model/config.json").read_text())
    (folder / "model/config.json").write_text(json.dumps({**config, "canvas_length": None}))
    return []


def foreign_metrics(folder: Path) -> list[str]:
    (folder / "run").mkdir()
    (folder / "run/metrics.jsonl").write_text('{"step": 1}\n')
    return []


def missing_shard(folder: Path) -> list[str]:
    index = {"metadata": {}, "weight_map": {"model.decoder.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model/model.safetensors.index.json").write_text(json.dumps(index))
    return []


def truncated_weights(folder: Path) -> list[str]:
    weights = folder / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return []


def another_config(folder: Path) -> list[str]:
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    settings["optimizer"]["lr"] = 0.5
    (folder / "run").mkdir()
    (folder / "run/config.yaml").write_text(yaml.safe_dump(settings))
    return []


def unwritable(folder: Path) -> list[str]:
    (folder / "file").write_text("")
    return [f"run.dir={folder}/file/run"]


def lost_checkpoint(folder: Path) -> list[str]:
    (folder / "run/checkpoints/step-000010").mkdir(parents=True)
    shutil.copy(folder / "run.yaml", folder / "run/config.yaml")
    return []


# what is broken, and what the message must name
MISTAKES = {
    "unknown key": (lambda folder: ["optimizer.lear=1"], ["optimizer.lear", "Did you mean optimizer.lr?"]),
    "missing file": (lambda folder: [f"data.train={folder}/absent.jsonl"], ["absent.jsonl"]),
    "missing model": (lambda folder: [f"model.path={folder}/absent"], ["model.path", "absent"]),
    "broken line": (broken_line, ["broken.jsonl:3"]),
    "empty messages": (empty_messages, ["broken.jsonl:1"]),
    "no assistant turn": (no_assistant, ["broken.jsonl:1", "assistant"]),
    "an image's place": (
        image_in_the_text,
        ["broken.jsonl:5: messages[0].content holds <|image|>", "not trained on yet"],
    ),
    "no chat template": (no_template, ["chat template"]),
    "no tokenizer": (no_tokenizer, ["no tokenizer", "tokenizer.json"]),
    "model config of a wrong type": (wrong_type_in_model_config, ["model.path", "could not be read"]),
    "model without canvas": (no_canvas, ["canvas_length None"]),
    "somebody's metrics": (foreign_metrics, ["run.dir", "not a run of ours"]),
    "empty path": (lambda folder: ["run.dir="], ["run.dir"]),
    "number of many digits": (lambda folder: ["seed=" + "9" * 5000], ["seed", "a whole number"]),
    "endless time-out": (lambda folder: ["parallel.collective_timeout_minutes=1e300"], ["collective_timeout_minutes"]),
    "batch that does not divide": (lambda folder: ["train.micro_batch_size=3"], ["train.global_batch_size"]),
    "experts that do not divide": (
        lambda folder: ["parallel.expert_parallel_size=16"],
        ["parallel.expert_parallel_size", "16"],
    ),
    "missing shard": (missing_shard, ["model-00002-of-00002.safetensors"]),
    "truncated weights": (truncated_weights, ["model.safetensors", "cannot be read"]),
    "another run's directory": (another_config, ["optimizer.lr", "another config"]),
    "unwritable directory": (unwritable, ["run.dir", "cannot be used", "file"]),
    "no whole checkpoint": (lost_checkpoint, ["step-000010", "state.json"]),
    "sequence parallelism": (
        lambda folder: [f"deepspeed={write_json(folder, {'sequence_parallel_size': 2})}"],
        ["sequence_parallel_size"],
    ),
}


def write_json(folder: Path, more: dict) -> Path:
    (folder / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"stage": 3}, **more}))
    return folder / "deepspeed.json"


@pytest.fixture
def copied_run(sudoku_run: Path, tmp_path: Path) -> Path:
    """The shared run's files, for a test to break."""
    folder = tmp_path / "copy"
    shutil.copytree(sudoku_run.parent, folder, ignore=shutil.ignore_patterns("run"))
    settings = (folder / "run.yaml").read_text().replace(str(sudoku_run.parent), str(folder))
    (folder / "run.yaml").write_text(settings.replace("micro_batch_size: 8", "micro_batch_size: 4"))
    return folder / "run.yaml"


def files_of(folder: Path) -> dict[str, float]:
    """Every file with its time of change."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_any_weight_is_read(mistake, copied_run):
    break_it, named = MISTAKES[mistake]
    overrides = break_it(copied_run.parent)
    before = files_of(copied_run.parent)

    def open_run() -> None:
        config = load_config(copied_run, overrides)
        with claim(config.run.dir):
            start = find_start(config)
            prepare(config, RankLayout(0, 2, 0, 2, config.parallel.expert_parallel_size), start)

    with pytest.raises(UserError) as raised:
        open_run()
    for words in named:
        assert words in str(raised.value)
    after = files_of(copied_run.parent)
    assert {path: after.get(path) for path in before} == before, "something was overwritten"


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["unknown key", "broken line", "experts that do not divide"])
def test_a_mistake_is_told_once_and_ends_every_rank(mistake, copied_run, tmp_path):
    break_it, named = MISTAKES[mistake]
    log = tmp_path / "log"
    ranks = start_ranks(copied_run, break_it(copied_run.parent), 2, log)
    try:
        codes = [rank.wait(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    text = log.read_text()
    assert codes == [2, 2], text
    assert "Traceback" not in text
    assert text.count(named[0]) == 1, text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory_is_refused(copied_run, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    (rank,) = start_ranks(copied_run, [f"run.dir={locked}/run"], 1, tmp_path / "log")
    assert rank.wait(timeout=120) == 2
    assert "cannot be used" in (tmp_path / "log").read_text()
