"""Rows with and without images on any ranks: the same losses, no rank that waits, resume to the bit."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ds_dgemma.checkpoint.export import export_run
from ds_dgemma.data.shapes import write_shapes
from ds_dgemma.errors import EXIT_STOPPED
from ds_dgemma.tools.tiny import make_tiny
from tests.engine.test_topologies import ALONE, Leg, assert_equal, go
from tests.forks import REPOSITORY
from tests.training import RUN, read_metrics

pytestmark = pytest.mark.slow

STEPS = 4
EMBEDDING = "model.encoder.embed_vision.embedding_projection.weight"
TRAINED = ["model.train_vision_embedding=true"]  # then every rank calls it, images or not
LORA = ["lora.r=4", "lora.target_parameters=[experts.gate_up_proj,experts.down_proj]"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over rows with 0, 1 and 3 images; a micro-batch of two has none, now and then."""
    folder = tmp_path_factory.mktemp("images")
    make_tiny("shapes", folder / "model")
    settings = json.loads((folder / "model/config.json").read_text())
    settings["text_config"]["top_k_experts"] = settings["text_config"]["num_experts"]  # a near tie would swap
    (folder / "model/config.json").write_text(json.dumps(settings))
    write_shapes("train", 48, 0, folder / "drawn.jsonl")
    drawn = [json.loads(line)["messages"] for line in (folder / "drawn.jsonl").read_text().splitlines()]
    rows = []
    for number, (user, model) in enumerate(drawn):
        image, text = user["content"]
        content = [[text], [image, text], [image, text, image, image]][number % 3 if number % 4 else 0]
        rows.append({"messages": [{**user, "content": content}, model]})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(RUN.format(folder=folder, repository=REPOSITORY))
    return folder / "run.yaml"


def test_a_run_with_images_is_the_same_on_all_ranks_and_goes_on_to_the_bit(config: Path, tmp_path: Path) -> None:
    alone = go(config, tmp_path / "alone", ALONE, STEPS, TRAINED)
    shared = go(config, tmp_path / "shared", Leg(2, 2, 1), STEPS, TRAINED)
    assert_equal(shared, alone, "EP 2")
    stopped = ["--stop-after", "2"]
    go(config, tmp_path / "stopped", Leg(2, 2, 1), STEPS, TRAINED, *stopped, ends_with=EXIT_STOPPED)
    go(config, tmp_path / "stopped", Leg(2, 2, 1), STEPS, TRAINED)
    exact = ("loss", "loss_diffusion", "loss_ar", "grad_norm")
    assert [[step[name] for name in exact] for step in read_metrics(tmp_path / "stopped")] == [
        [step[name] for name in exact] for step in shared
    ]
    assert_equal(go(config, tmp_path / "two", Leg(2, 1, 2), 2, TRAINED), alone[:2], "data parallel, accumulated")

    out = export_run(tmp_path / "shared", tmp_path / "export")
    ours, base = (load_file(folder / "model.safetensors") for folder in (out, config.parent / "model"))
    tower = [name for name in base if name.startswith("model.encoder.vision_tower.")]
    assert tower
    assert all(ours[name].equal(base[name]) for name in tower)
    assert not ours[EMBEDDING].equal(base[EMBEDDING])


@pytest.mark.parametrize("kind", ["packed", "lora"])
def test_packed_and_adapted_they_are_too(kind: str, config: Path, tmp_path: Path) -> None:
    settings = ["data.max_length=400", "data.packing=true"] if kind == "packed" else LORA
    alone = go(config, tmp_path / "alone", ALONE, 2, settings)
    assert_equal(go(config, tmp_path / "shared", Leg(2, 2, 2), 2, settings), alone, kind)
