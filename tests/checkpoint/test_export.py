"""An export is the trained model, all else bit for bit, whatever wrote it; and never half of one."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DiffusionGemmaForBlockDiffusion

from ds_dgemma.checkpoint.export import export_run
from ds_dgemma.checkpoint.hf_weights import Layout
from ds_dgemma.checkpoint.manifest import read_state, write_state
from ds_dgemma.checkpoint.run_state import open_checkpoint
from ds_dgemma.checkpoint.same import check_same_model
from ds_dgemma.checkpoint.weights import WeightReader, model_digest
from ds_dgemma.checkpoint.whole_directory import whole_directory
from ds_dgemma.config.yaml import read_yaml
from ds_dgemma.errors import UserError
from tests.benchmarks.real_checkpoint import make_checkpoint
from tests.gpu import shapes
from tests.reference.trained_run import trained, was_trained, write_run
from tests.training import REPOSITORY, start_module, train

SMALL = Layout(shard_bytes=50_000, workers=3)
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 checkpoint in several shards, with all that the released one has."""
    directory = tmp_path_factory.mktemp("model") / "model"
    make_checkpoint(shapes.config(rehearse=True, layers=2), directory, shard_gb=1e-4)
    return directory


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Path:
    """A run that trained every weight of the decoder: its state as two ranks leave it, cut anywhere."""
    return write_run(tmp_path / "run", model, "bf16")


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    reader = WeightReader(directory)
    return {name: reader.read(name) for name in reader.files}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("layout", [Layout(), SMALL], ids=["one file", "many files, three writers"])
def test_what_was_trained_is_exported_and_all_else_is_carried_over_bit_for_bit(layout, run, model, tmp_path):
    out = export_run(run, tmp_path / "out", layout=layout)
    source, exported = tensors_of(model), tensors_of(out)
    assert exported.keys() == source.keys()
    for name, tensor in source.items():
        expected = trained(tensor).bfloat16() if was_trained(name) else tensor
        assert exported[name].dtype == torch.bfloat16
        assert bits(exported[name]) == bits(expected), name
    for file in COMPANIONS:
        assert (out / file).read_bytes() == (model / file).read_bytes()
    assert (out / "model.safetensors.index.json").exists() == (layout is SMALL)
    loaded: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(out, output_loading_info=True)
    assert not any(loaded[1].values())


def test_copies_of_tied_weights_do_not_outlive_training(model, tmp_path):
    source = tmp_path / "tied"
    shutil.copytree(model, source, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = tensors_of(model)
    copies = {"lm_head.weight": tensors["model.decoder.embed_tokens.weight"].clone()}
    for name in filter(was_trained, tensors):
        if "self_conditioning" not in name:  # the decoder's alone
            copies[name.replace("model.decoder.", "model.encoder.language_model.")] = tensors[name].clone()
    save_file({**tensors, **copies}, source / "model.safetensors")
    out = export_run(write_run(tmp_path / "run", model, "bf16"), tmp_path / "plain")
    run = write_run(tmp_path / "run-tied", source, "bf16")
    tied = export_run(run, tmp_path / "out", layout=SMALL)
    assert tensors_of(tied).keys() == tensors_of(out).keys() == tensors.keys()
    loaded: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(tied)
    assert torch.equal(loaded.lm_head.weight, tensors_of(out)["model.decoder.embed_tokens.weight"])


def test_other_copies_of_the_old_weights_are_not_carried_over(model, tmp_path):
    source = Path(shutil.copytree(model, tmp_path / "model"))
    stale = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors.index.fp16.json", "q4.gguf")
    kept = ("tokenizer.model", "preprocessor_config.json", "index.json", "README.md")
    for name in (*stale, *kept, "tf_model.h5", "model.onnx"):
        (source / name).write_bytes(b"old")
    out = export_run(write_run(tmp_path / "run", source, "bf16"), tmp_path / "out")
    names = {file.name for file in out.iterdir()}
    assert names == {"config.json", "model.safetensors", ".ds_dgemma", *COMPANIONS, *kept}


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_encoder_scalars_that_are_missing_are_exported_as_the_decoders(dtype, model, tmp_path):
    source = tmp_path / "without"
    shutil.copytree(model, source, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = tensors_of(model)
    twins = {name: name.replace("encoder.language_model", "decoder") for name in tensors if name.endswith("r_scalar")}
    twins = {name: twin for name, twin in twins.items() if name != twin}
    assert twins
    save_file({name: tensor for name, tensor in tensors.items() if name not in twins}, source / "model.safetensors")
    out = export_run(write_run(tmp_path / "run", source, "bf16"), tmp_path / "out", dtype=dtype)
    exported = tensors_of(out)
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[name], tensors[twin].to(exported[name].dtype)) for name, twin in twins.items())


def test_a_model_that_changed_since_a_checkpoint_is_neither_exported_nor_resumed(model, tmp_path):
    source = tmp_path / "base"
    shutil.copytree(model, source, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = tensors_of(model)
    save_file(tensors, source / "model.safetensors")
    assert model_digest(source) == model_digest(model)  # other files, the same weights
    run = write_run(tmp_path / "run", source, "bf16")
    step = run / "checkpoints/step-000003"
    facts = read_state(step)
    files = facts.pop("files")
    write_state(step, {**facts, "model_digest": model_digest(model)}, files)
    export_run(run, tmp_path / "out")

    for name in ("model.encoder.vision_tower.patch_embedder.input_proj.weight", "model.decoder.norm.weight"):
        changed = {**tensors, name: tensors[name].clone()}
        changed[name].view(-1)[-1] += 1
        save_file(changed, source / "model.safetensors")
        with pytest.raises(UserError, match=f"{source} has changed since {step}"):
            export_run(run, tmp_path / "out")
        with pytest.raises(UserError, match=f"{source} has changed since {step}"):
            check_same_model(str(source), model_digest(source), open_checkpoint(step))
    write_state(step, facts, files)  # of a version that did not look
    export_run(run, tmp_path / "out")


def test_no_shard_is_larger_than_asked_but_one_with_a_single_tensor(run, tmp_path):
    out = export_run(run, tmp_path / "out", layout=SMALL)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = tensors_of(out)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for file in set(index["weight_map"].values()):
        names = [name for name in tensors if index["weight_map"][name] == file]
        assert len(names) == 1 or sum(tensors[name].nbytes for name in names) <= SMALL.shard_bytes


def test_a_bf16_run_on_fp32_weights_exports_bf16_and_leaves_the_untrained_as_they_were(model, tmp_path):
    source = tmp_path / "fp32"
    shutil.copytree(model, source, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file({name: tensor.float() for name, tensor in tensors_of(model).items()}, source / "model.safetensors")
    out = export_run(write_run(tmp_path / "run", source, "bf16"), tmp_path / "out")
    for name, tensor in tensors_of(out).items():
        assert tensor.dtype == (torch.bfloat16 if was_trained(name) else torch.float32), name
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    whole = export_run(write_run(tmp_path / "run32", source, "fp32"), tmp_path / "out32")
    assert {tensor.dtype for tensor in tensors_of(whole).values()} == {torch.float32}


def start_export(run: Path, out: Path, **options: Any) -> subprocess.Popen:
    command = [sys.executable, "-m", "ds_dgemma", "export", "--run", run, "--out", out, "--shard-size", "0.00001"]
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, **options)


def files_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_a_killed_export_leaves_the_old_one_and_the_next_cleans_up(run, tmp_path):
    out = export_run(run, tmp_path / "out")
    old = files_of(out)
    export = start_export(run, out)
    partial = tmp_path / ".out.ds_dgemma-partial"
    while not any(partial.glob("*.safetensors")):
        assert export.poll() is None, "it ended before it could be killed"
        time.sleep(0.0005)
    export.send_signal(signal.SIGKILL)
    export.communicate()
    assert partial.is_dir()
    assert files_of(out) == old
    out.rename(tmp_path / ".out.ds_dgemma-old")  # as if killed while the new one took the old one's place
    export_run(run, out)
    assert files_of(out) == old
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def test_a_disk_that_refuses_is_told_and_leaves_the_old_export(run, tmp_path):
    out = export_run(run, tmp_path / "out")
    old = files_of(out)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # noqa: E731
    export = start_export(run, out, preexec_fn=limit)
    _, told = export.communicate()
    assert export.returncode == 2
    assert f"--out {out} could not be written" in told
    assert "Traceback" not in told
    assert files_of(out) == old
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def test_the_model_that_a_run_started_from_is_not_overwritten(run, model):
    before = files_of(model)
    with pytest.raises(UserError, match="is the model itself"):
        export_run(run, model)
    assert files_of(model) == before


def test_somebodys_files_beside_an_old_export_are_not_lost(run, tmp_path):
    out = export_run(run, tmp_path / "out")
    (out / "notes.md").write_text("which puzzles it fails")
    before = files_of(out)
    with pytest.raises(UserError, match=r"holds notes\.md"):
        export_run(run, out)
    assert files_of(out) == before


def test_somebodys_directories_beside_the_place_of_an_export_are_neither_taken_nor_removed(run, tmp_path):
    out = tmp_path / "out"
    kept = [export_run(run, tmp_path / "out.old")]  # an export that was moved away
    for name in ("out.partial", "out.lock", ".out.ds_dgemma-old"):
        kept.append(tmp_path / name)
        kept[-1].mkdir()
        (kept[-1] / "notes.md").write_text("mine")
    before = [files_of(directory) for directory in kept]
    with pytest.raises(UserError, match=r"out could not be written: .*\.out\.ds_dgemma-old: Directory not empty"):
        export_run(run, out)
    assert [files_of(directory) for directory in kept] == before
    shutil.rmtree(kept.pop())
    export_run(run, out)
    assert [files_of(directory) for directory in kept] == before[:-1]
    assert out.is_dir()


def test_a_model_that_was_not_exported_here_is_not_replaced(run, model, tmp_path):
    other = Path(shutil.copytree(model, tmp_path / "other"))
    before = files_of(other)
    with pytest.raises(UserError, match="did not write"):
        export_run(run, other)
    assert files_of(other) == before


def test_an_export_through_a_link_replaces_what_it_names_and_keeps_the_link(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    for _ in range(2):
        export_run(run, tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "elsewhere/config.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out", "elsewhere"}


def test_a_damaged_checkpoint_is_not_exported_but_an_older_one_in_its_place(run, tmp_path, capsys):
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "step-000003", checkpoints / "step-000004")
    state = read_state(checkpoints / "step-000003")
    write_state(checkpoints / "step-000004", {**state, "step": 4}, state["files"])
    shard = checkpoints / "step-000004/1.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    expected = files_of(export_run(run, tmp_path / "expected", step=3))
    assert files_of(export_run(run, tmp_path / "out")) == expected
    assert "step-000004 is damaged: 1.safetensors is not what was written" in capsys.readouterr().err
    for step, said in ((4, "step-000004 is damaged"), ("best", "no checkpoint of .* has what best_by measures")):
        with pytest.raises(UserError, match=said):
            export_run(run, tmp_path / "other", step=step)
    assert not (tmp_path / "other").exists()


def test_two_exports_to_one_place_do_not_mix(run, tmp_path):
    with whole_directory(tmp_path / "out", "config.json", set()), pytest.raises(UserError, match="another process"):
        export_run(run, tmp_path / "out")


def test_a_run_whose_model_or_settings_are_gone_is_told(model, tmp_path):
    run = write_run(tmp_path / "run", Path(shutil.copytree(model, tmp_path / "model")), "bf16")
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(UserError, match="started from a model that is gone"):
        export_run(run, tmp_path / "out")
    settings = read_yaml(run / "config.yaml")
    for broken, said in (([], "holds no settings"), ({**settings, "seed": "x"}, ".*: seed = 'x': Input should be")):
        (run / "config.yaml").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=rf"config\.yaml {said}"):
            export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_topology_of_a_run_does_not_show_in_its_export(precision, sudoku_run, tmp_path):
    settings = [f"train.precision={precision}", "train.max_steps=3", "optimizer.warmup_steps=1"]
    shared = [*settings, "parallel.expert_parallel_size=2", "train.micro_batch_size=4"]
    train(sudoku_run, tmp_path / "two", shared, processes=2)

    shutil.copytree(tmp_path / "two", tmp_path / "one", ignore=shutil.ignore_patterns("checkpoints", "run.lock"))
    alone = [argument for setting in [f"run.dir={tmp_path}/two", *settings] for argument in ("--set", setting)]
    out = ["--config", str(sudoku_run), "--out", str(tmp_path / "one/checkpoints")]
    (rank,) = start_module(["tests.checkpoint.resave", *out, *alone], 1, tmp_path / "log")
    assert rank.wait(timeout=900) == 0, (tmp_path / "log").read_text()

    states = [[file.name for file in (tmp_path / run).glob("checkpoints/*/*.safetensors")] for run in ("two", "one")]
    assert [len(files) for files in states] == [2, 1]  # as many as ranks
    two, one = (
        load_file(export_run(tmp_path / run, tmp_path / f"{run}-out") / "model.safetensors") for run in ("two", "one")
    )
    source = load_file(sudoku_run.parent / "model/model.safetensors")
    assert two.keys() == one.keys() == source.keys()
    for name, tensor in two.items():
        assert bits(tensor) == bits(one[name]), name
        frozen = not was_trained(name) or ".router." in name
        assert tensor.dtype == (torch.float32 if frozen or precision == "fp32" else torch.bfloat16)
    moved = {
        name for name, tensor in two.items() if not torch.equal(tensor.float(), source[name].to(tensor.dtype).float())
    }
    assert {"model.decoder.layers.0.experts.gate_up_proj", "model.decoder.embed_tokens.weight"} <= moved
    assert all(was_trained(name) and ".router." not in name for name in moved)
