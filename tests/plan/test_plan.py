"""What `plan` says before a run: counts that are the model's own, sums that hold by hand, a verdict that is kept."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, DiffusionGemmaForBlockDiffusion

from ds_dgemma.cli import main
from ds_dgemma.config.file import load_config
from ds_dgemma.errors import UserError
from ds_dgemma.model.flops import batch_work, forward_flops
from ds_dgemma.model.parts import Canvas
from ds_dgemma.model.spec import text_spec
from ds_dgemma.model.sweep import Places, make_calls
from ds_dgemma.plan.activations import trace
from ds_dgemma.plan.inventory import build_stack_for
from ds_dgemma.plan.plan import RELEASED_SHAPES, Limits, Plan, make_plan, read_shapes
from ds_dgemma.plan.report import verdict
from ds_dgemma.plan.setup import Shape
from ds_dgemma.run.utilisation import documents_of
from tests.benchmarks.step import make_batch
from tests.gpu import shapes

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
RUN = f"""
run: {{dir: run}}
model: {{path: google/diffusiongemma-26B-A4B-it}}
data: {{train: train.jsonl, max_length: 1024}}
train: {{max_steps: 10, global_batch_size: 64, micro_batch_size: 1}}
deepspeed: {ROOT}/ds_configs/zero3.json
"""


def write(folder: Path) -> Path:
    (folder / "run.yaml").write_text(RUN)
    return folder / "run.yaml"


def plan(tmp_path: Path, *overrides: str, gpus: int = 8, gpu_memory: float = 80, host: float | None = None) -> Plan:
    config = load_config(write(tmp_path), overrides)
    return make_plan(config, gpus, Limits(gpu_memory, host, 8))


def test_parameters_are_counted_as_transformers_counts_them(tmp_path):
    inventory = plan(tmp_path).inventory
    with torch.device("meta"):
        model = DiffusionGemmaForBlockDiffusion(AutoConfig.from_pretrained(RELEASED_SHAPES))
    assert inventory.count + inventory.outside == sum(p.numel() for p in model.parameters())
    decoder: Any = model.model.decoder
    routers = sum(p.numel() for layer in decoder.layers for p in layer.router.parameters())
    assert inventory.count - inventory.trained_count == routers


def test_the_states_of_full_training_are_the_sum_by_hand(tmp_path):
    found = plan(tmp_path, "parallel.expert_parallel_size=8")
    resident, text = found.memory.resident, found.inventory.text
    experts = text.num_hidden_layers * text.num_experts * 3 * text.hidden_size * text.moe_intermediate_size
    rank = experts / 8 + (found.inventory.count - experts) / 8  # 1/8 of the experts, and of all the rest
    assert resident["weights"] == pytest.approx(2 * rank, rel=1e-4)
    for kind, bytes_each in (("fp32 master", 4), ("moments", 8), ("gradients", 4)):
        assert resident[kind] == pytest.approx(bytes_each * rank, rel=1e-3)  # routers have none
    lora = plan(tmp_path, "lora={r: 16}", gpus=1)
    factors = lora.inventory.trained_count
    assert lora.memory.resident["moments"] == 8 * factors
    assert lora.memory.resident["weights"] == 2 * (found.inventory.count + factors)


def test_expert_adapters_are_shared_as_experts_are(tmp_path):
    expert_pairs = "lora={r: 8, target_modules: null, target_parameters: [experts.gate_up_proj, experts.down_proj]}"
    found = plan(tmp_path, expert_pairs, "parallel.expert_parallel_size=4")
    text = found.inventory.text
    F, H = text.moe_intermediate_size, text.hidden_size
    assert found.inventory.trained_count == text.num_hidden_layers * text.num_experts * 8 * (H + 2 * F + F + H)
    assert found.memory.resident["fp32 master"] == pytest.approx(4 * found.inventory.trained_count / 8, rel=1e-6)


def test_what_is_frozen_has_no_optimizer_state(tmp_path):
    whole = plan(tmp_path)
    frozen = plan(tmp_path, "model.freeze=['*.experts.*', '*.embed_tokens.weight']")
    assert frozen.inventory.count == whole.inventory.count
    assert frozen.memory.resident["moments"] < whole.memory.resident["moments"] / 10
    assert not frozen.memory.moments["vocabulary"]["vocabulary's fp32 gradient"]
    assert frozen.cost.useful_flops < whole.cost.useful_flops


def test_a_verdict_holds_for_the_setup_that_it_names(tmp_path):
    large = ["train.micro_batch_size=8", "train.activation_checkpointing=none", "parallel.expert_parallel_size=8"]
    found = plan(tmp_path, *large)
    assert found.problems
    assert found.nearest is not None
    settings = [change.replace(": ", "=") for change in found.nearest.changes]
    assert not plan(tmp_path, *large, *settings).problems
    for needed in settings:
        assert plan(tmp_path, *large, *(other for other in settings if other != needed)).problems
    assert plan(tmp_path, *large, gpu_memory=10, host=1).nearest is None  # nothing can be done
    offloaded = plan(tmp_path, gpu_memory=20, host=1000)
    assert offloaded.nearest is not None
    needed = sum(offloaded.nearest.memory.host.values()) * offloaded.nearest.setup.gpus
    assert needed
    assert f"{needed / GIB:.0f} GiB of a node's host memory)" in verdict(offloaded)


def test_less_than_a_canvas_is_refused_as_training_would(tmp_path):
    with pytest.raises(UserError, match=r"data\.max_length = 255 is less than a canvas, 256 tokens"):
        plan(tmp_path, "data.max_length=255")
    assert plan(tmp_path, "data.max_length=256").shape.clean == 256


def test_a_micro_batch_of_any_size_is_divided(tmp_path):
    found = plan(tmp_path, "train.global_batch_size=10000000", "train.micro_batch_size=10000000", gpus=1)
    assert found.nearest is not None
    setup = found.nearest.setup
    assert found.setup.global_batch_size % (setup.micro_batch_size * setup.gpus) == 0


def test_a_group_that_training_would_refuse_is_refused(tmp_path):
    lora = "lora={r: 8, target_parameters: [experts.down_proj]}"
    for match in ("*.lora_B", "*.experts.down_proj.lora_A"):
        plan(tmp_path, lora, f"optimizer.groups=[{{match: '{match}', lr: 1e-4}}]", gpus=1)
    with pytest.raises(UserError, match=r"optimizer.groups.0.match  '\*.lora_C'"):
        plan(tmp_path, lora, "optimizer.groups=[{match: '*.lora_C', lr: 1e-4}]", gpus=1)
    for match in ("*.mlp.down_proj.weight", "*.vision_tower.*"):
        with pytest.raises(UserError, match=r"not trained: frozen by model.freeze or lora"):
            plan(tmp_path, lora, f"optimizer.groups=[{{match: '{match}', lr: 1e-4}}]", gpus=1)


def test_a_balance_loss_without_a_router_to_train_is_refused(tmp_path):
    weight = "objective.router_balance_weight=0.01"
    plan(tmp_path, weight, "model.train_router=true")
    plan(tmp_path, weight, "lora={r: 8, target_modules: [q_proj, router.proj]}")
    for frozen in (["lora={r: 8}"], ["model.train_router=true", "model.freeze=['*.router.*']"]):
        with pytest.raises(UserError, match=r"objective.router_balance_weight = 0.01: every router is frozen"):
            plan(tmp_path, weight, *frozen)


def test_a_balance_loss_over_micro_batches_costs_a_forward_of_both_passes(tmp_path):
    trained = ["model.train_router=true", "parallel.expert_parallel_size=8"]
    weight = "objective.router_balance_weight=0.01"
    without, counted = plan(tmp_path, *trained).cost, plan(tmp_path, *trained, weight).cost
    # 1,024 clean tokens, a canvas of 256 and its first guess: forward, again but for the last of 30 layers, gradients;
    # one forward more.
    step, forward = (2 + 29 / 30) * (1024 + 256) + 256, 1024 + 256 + 256
    assert counted.sent["all-to-all"] / without.sent["all-to-all"] == pytest.approx((step + forward) / step)
    assert counted.useful_flops == without.useful_flops
    assert counted.flops > without.flops
    one_micro_batch = [*trained, "train.micro_batch_size=8"]
    assert plan(tmp_path, *one_micro_batch, weight).cost == plan(tmp_path, *one_micro_batch).cost


@pytest.mark.parametrize(("offload", "gpu_memory"), [({}, 70), ({"offload_optimizer": {"device": "cpu"}}, 14)])
def test_a_proposal_of_stage_3_needs_what_that_json_needs(offload, gpu_memory, tmp_path):
    zero = {"stage": 2, "reduce_bucket_size": 10**6, **offload}
    (tmp_path / "zero2.json").write_text(json.dumps({"zero_optimization": zero}))
    found = plan(tmp_path, f"deepspeed={tmp_path / 'zero2.json'}", gpu_memory=gpu_memory)
    assert found.nearest is not None
    zero["stage"] = 3
    assert '"stage": 3 in the JSON\'s zero_optimization' in found.nearest.changes
    if any("offload_optimizer" in change for change in found.nearest.changes):
        zero["offload_optimizer"] = {"device": "cpu"}
    (tmp_path / "advised.json").write_text(json.dumps({"zero_optimization": zero}))
    settings = [change.replace(": ", "=") for change in found.nearest.changes if "." in change.partition(":")[0]]
    advised = plan(tmp_path, f"deepspeed={tmp_path / 'advised.json'}", *settings, gpus=found.nearest.setup.gpus)
    assert advised.memory == found.nearest.memory
    assert not advised.problems


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_moves_the_optimizer_to_host_memory(stage, tmp_path):
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    found = plan(tmp_path, f"deepspeed={tmp_path / 'zero.json'}", "parallel.expert_parallel_size=8")
    assert not {"fp32 master", "moments", "gradients"} & found.memory.resident.keys()
    shares = found.memory.host["fp32 master"] / 4
    assert found.memory.host["moments"] == 8 * shares
    assert plan(tmp_path, f"deepspeed={tmp_path / 'zero.json'}", host=16).problems


def test_activations_are_those_that_a_layer_keeps_on_the_cpu(sudoku_run):
    config = load_config(sudoku_run)
    spec, _ = read_shapes(config)
    shape = Shape(96, 1, 20)
    first = trace(build_stack_for(config, spec), shape, torch.float32)[0]
    stack = build_stack_for(config, spec).to_empty(device="cpu")
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    layer, H = next(iter(stack.sweep_layers())), text_spec(spec).hidden_size
    inputs = torch.randn(1, shape.tokens, H, requires_grad=True)
    places = Places.on("cpu", (96,), (Canvas(0, 76),), 20, guessed=(0,))
    calls = make_calls(stack, places, False, inputs)
    of_calls = (calls.all.is_canvas_N1, *(tensor for pair in calls.all.rotary.values() for tensor in pair))
    given = {t.untyped_storage().data_ptr() for t in (inputs, *of_calls, *layer.parameters(), *layer.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in given:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer.block(inputs, calls.all)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    experts = shape.tokens * text_spec(spec).top_k_experts * (first["full"].row + first["full"].returned)
    assert first["full"].again + experts == pytest.approx(measured, rel=0.1)


def test_what_checkpointing_keeps_is_the_sum_by_hand(tmp_path):
    config = load_config(write(tmp_path))
    spec, _ = read_shapes(config)
    text, shape = text_spec(spec), Shape(4096, 1, 256)
    H, heads, k = text.hidden_size, text.num_attention_heads, text.top_k_experts
    traced = trace(build_stack_for(config, spec), shape, torch.bfloat16)
    for kind, number, size in (("sliding", 0, 256), ("full", 5, 512)):
        assert text.layer_types[number].startswith(kind)
        kept = traced[number]
        token = 2 * H + 8 * k  # a layer's input, and the experts that were chosen
        attended = 2 * heads * size + 4 * heads  # attention's output, its normaliser
        assert kept["full"].stored == token * shape.tokens
        assert kept["selective"].stored == (token + attended) * shape.tokens
        # Nothing is computed again: the same graph, which has all keys and values, and its input.
        all_kept = kept["full"].again + 2 * H * shape.tokens
        assert kept["none"].stored == pytest.approx(all_kept, rel=0.01)
    last = traced[-1]  # the backward pass begins with it
    assert last["full"] == last["selective"] == last["none"]


def test_arithmetic_is_that_of_the_batch(tmp_path):
    clean, canvas, rows = 512, 16, 4
    shapes.config(rehearse=True, layers=3).save_pretrained(tmp_path / "model")
    settings = [f"model.path={tmp_path / 'model'}", f"data.max_length={clean}"]
    batching = ["train.global_batch_size=8", f"train.micro_batch_size={rows}"]
    found = plan(tmp_path, *settings, *batching, "objective.self_conditioning_probability=0.5", gpus=1)
    batch = make_batch(clean - canvas, canvas, rows, found.inventory.text.vocab_size, canvas)  # half of the coins true
    assert found.cost.useful_flops == 2 * batch_work(found.inventory.products, documents_of([batch]))
    # Full checkpointing computes the forward again of clean tokens and canvases, in all layers but the last.
    nothing_again = plan(tmp_path, *settings, *batching, "train.activation_checkpointing=none", gpus=1).cost
    products = found.inventory.products
    kept = replace(products, layers=products.layers[:-1])
    again = forward_flops(kept, clean, [clean - canvas]) - products.block.forward(canvas, 0)
    assert found.cost.flops - nothing_again.flops == 2 * rows * again


def test_a_model_of_one_layer_has_a_plan(tmp_path):
    shapes.config(rehearse=True, layers=1).save_pretrained(tmp_path / "model")
    moment = plan(tmp_path, f"model.path={tmp_path / 'model'}", gpus=1).memory.moments["a layer, backward"]
    assert moment["one layer, kept or recomputed"]
    assert not moment["activations kept"]


def test_the_command_prints_a_table_or_json(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(RUN)
    common = ["plan", "--config", str(tmp_path / "run.yaml"), "--set", "parallel.expert_parallel_size=8"]
    assert main([*common, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["memory"]["peak"] < found["memory"]["needed"] < 80 * GIB
    with pytest.raises(SystemExit):
        main([*common, "--length", str(10**21)])
    assert "above 0 and at most" in capsys.readouterr().err
    assert main([*common, "--gpus", "4"]) == 2  # EP 8 on 4 ranks
    assert "does not divide 4 ranks" in capsys.readouterr().err
    assert main([*common[:3], "--gpu-memory", "24"]) == 1
    assert re.search(r"Does not fit on 8 GPUs of 24 GiB", capsys.readouterr().out)


def test_logits_in_large_chunks_are_told(tmp_path):
    found = plan(tmp_path, "objective.logits_chunk_mib=20000", gpu_memory=70)
    assert found.nearest is not None
    assert found.nearest.changes == ["objective.logits_chunk_mib: 64"]


def test_where_nothing_near_fits_that_is_said(tmp_path):
    found = plan(tmp_path, "data.max_length=512", gpu_memory=3)
    assert found.nearest is None
    assert "GPUs of this size: take GPUs of more memory, set data.max_length below 512" in verdict(found)


READY = sorted(path for path in (ROOT / "ds_configs" / "runs").glob("*.yaml") if "ds-dgemma plan" in path.read_text())


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_a_ready_config_says_what_plan_says_of_it(path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    title, command, said, *_ = path.read_text().splitlines()
    assert title.startswith("# ")
    assert f"--config {path.relative_to(ROOT)} " in command
    assert main([*command.removeprefix("# $ ds-dgemma ").split(), "--json"]) == 0
    assert said == "# " + json.loads(capsys.readouterr().out)["verdict"]


def test_the_real_model_has_ready_configs():
    assert {path.stem for path in READY} == {
        "sft_26b", "sft_26b_4gpu", "sft_26b_2nodes", "lora_26b", "lora_26b_48gb", "lora_26b_24gb",
    }  # fmt: skip
