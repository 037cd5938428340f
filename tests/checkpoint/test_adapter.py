"""What unmodified PEFT makes of our adapters on unmodified transformers, and what we make of PEFT's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DiffusionGemmaForBlockDiffusion, DynamicCache

from ds_dgemma.checkpoint.adapter import CONFIG, TENSORS, AdapterReader
from ds_dgemma.checkpoint.export import merge_adapter
from ds_dgemma.cli import main
from ds_dgemma.config.run import LoraSection
from ds_dgemma.errors import UserError
from ds_dgemma.model.build import build_stack
from ds_dgemma.model.lora import Target, check_continues, choose_targets, possible_targets, scaling
from tests.reference.adapters import REVISION, write_random_adapter
from tests.reference.fixtures import Case, make_config, make_model
from tests.reference.float64 import DoublePrecision

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
CASE = Case(experts=3)  # not a divisor of the rank: the order of ranks and experts shows
SETTINGS = {
    "experts": {"target_parameters": EXPERTS},
    "one of the two": {"target_modules": None, "target_parameters": ["0.experts.gate_up_proj", "1.experts.down_proj"]},
    "linears": {"target_modules": "all-linear", "use_rslora": True},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in float64."""
    folder = tmp_path_factory.mktemp("base")
    make_model(CASE).double().save_pretrained(folder)
    return folder


def possible() -> dict[str, Target]:
    return possible_targets(build_stack(make_config(CASE)))


def load(folder: Path) -> Any:
    model: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


def logits(model: Any) -> Tensor:
    """Of a self-conditioned pass: encoder and decoder both show."""
    draw = torch.Generator().manual_seed(3)
    ids, canvas = (torch.randint(3, CASE.vocabulary - 3, (2, n), generator=draw) for n in (9, CASE.canvas))
    call = {"input_ids": ids, "decoder_input_ids": canvas}
    cache = lambda: DynamicCache(config=model.config.text_config)  # noqa: E731
    with torch.no_grad(), DoublePrecision():
        first = model(**call, past_key_values=cache()).logits
        return model(**call, past_key_values=cache(), self_conditioning_logits=first).logits


@pytest.mark.parametrize("name", SETTINGS)
def test_peft_and_the_merged_model_give_the_same_logits(name: str, base: Path, tmp_path: Path):
    write_random_adapter(tmp_path / "adapter", base, **SETTINGS[name])
    plain = logits(load(base))
    adapted = logits(PeftModel.from_pretrained(load(base), str(tmp_path / "adapter")))
    merge_adapter(str(base), tmp_path / "adapter", tmp_path / "merged")
    merged = logits(load(tmp_path / "merged"))
    assert (adapted - plain).abs().max() > 0.1
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-9)


def test_merging_changes_what_is_adapted_and_copies_the_rest_bit_for_bit(base: Path, tmp_path: Path):
    targets, _, _ = write_random_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    command = ["merge", "--model", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "merged"]
    assert main([str(argument) for argument in command]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.decoder.{target.name}.weight" for target in targets}
    assert before.keys() == after.keys()
    for out in (base, base / "merged"):
        with pytest.raises(UserError, match="is the model itself, or in its directory"):
            merge_adapter(str(base), tmp_path / "adapter", out)


@pytest.mark.parametrize(
    ("factor", "value", "said"),
    [(1.0, torch.nan, r"NaN or infinity as float16: that of \S+ does already"), (1e5, 1.0, "does not fit into it")],
)
def test_a_merge_that_makes_no_numbers_is_refused(factor: float, value: float, said: str, base: Path, tmp_path: Path):
    half = tmp_path / "half"
    shutil.copytree(base, half)
    tensors = {name: tensor.half() for name, tensor in load_file(base / "model.safetensors").items()}
    tensors["model.decoder.layers.1.self_attn.q_proj.weight"][0, 0] = value
    save_file(tensors, half / "model.safetensors", metadata={"format": "pt"})
    write_random_adapter(tmp_path / "adapter", half, target_modules=["1.self_attn.q_proj"])
    change_tensors(lambda t: [f.mul_(factor) for f in t.values()])(tmp_path / "adapter")
    with pytest.raises(UserError, match=rf"model\.decoder\.layers\.1\.self_attn\.q_proj\.weight would hold .*{said}"):
        merge_adapter(str(half), tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        (lambda name: name.replace("experts.base_layer", "experts.0").replace("experts.lora", "experts.0.lora"),
         "has a pair for each expert"),
        (lambda name: name if ".decoder." in name else None, "has factors for the decoder only"),
    ],
)  # fmt: skip
def test_other_programs_forms_cannot_be_continued(keep: Any, said: str, base: Path, tmp_path: Path):
    write_random_adapter(tmp_path / "adapter", base, target_parameters=EXPERTS)

    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            value = tensors.pop(name)
            if kept := keep(name):
                tensors[kept] = value

    change_tensors(change)(tmp_path / "adapter")
    with pytest.raises(UserError, match=rf"^adapter \S+ {said}"):
        AdapterReader(tmp_path / "adapter", possible())


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_written_is_read_back_the_same(name: str, base: Path, tmp_path: Path):
    targets, lora, read = write_random_adapter(tmp_path / "adapter", base, **SETTINGS[name])
    reader = AdapterReader(tmp_path / "adapter", possible())
    assert (reader.settings["base_model_name_or_path"], reader.settings["revision"]) == (str(base), REVISION)
    check_continues(lora, targets, reader.lora, reader.targets)
    assert scaling(reader.lora) == scaling(lora)
    for target in targets:
        for factor in ("lora_A", "lora_B"):
            assert torch.equal(reader.read(target, factor), read(target, factor))
            flat = read(target, factor).flatten()
            assert torch.equal(reader.values(f"{target.name}.{factor}", 3, 11), flat[3:11])


def change_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def spoil(adapter: Path) -> None:
        tensors = load_file(adapter / TENSORS)
        change(tensors)
        save_file(tensors, adapter / TENSORS)

    return spoil


def change_settings(**changes) -> Callable[[Path], None]:
    def spoil(adapter: Path) -> None:
        settings = json.loads((adapter / CONFIG).read_text())
        (adapter / CONFIG).write_text(json.dumps({**settings, **changes}))

    return spoil


QUERY = "base_model.model.model.decoder.layers.0.self_attn.q_proj.lora_A.weight"
ENCODERS_QUERY = QUERY.replace("decoder", "encoder.language_model")
SPOILT = {
    "absent": (shutil.rmtree, "cannot be read: .*A PEFT directory has"),
    "no tensors": (lambda adapter: (adapter / TENSORS).unlink(), "cannot be read"),
    "cut": (lambda adapter: (adapter / TENSORS).write_bytes(b"cut"), "cannot be read"),
    "another method": (change_settings(peft_type="IA3"), "not of PEFT's type LORA"),
    "DoRA": (change_settings(use_dora=True), "uses use_dora"),
    "an option of a later PEFT": (change_settings(use_new={"x": 1}), "uses use_new: not supported"),
    "PiSSA": (change_settings(init_lora_weights="pissa"), "init_lora_weights = 'pissa', true, false or 'gaussian'"),
    "another rank": (change_settings(r=5), r"has shape \(4, 48\), \(5, 48\) was expected of this model and rank 5"),
    "no rank": (change_settings(r=0), "adapter_config.json: r = 0: Input should be greater than"),
    "no number": (
        change_settings(lora_alpha="x"),
        "adapter_config.json: lora_alpha = 'x': Input should be a valid num",
    ),
    "no name": (change_settings(base_model_name_or_path=5), "base_model_name_or_path = 5, a name was expected"),
    "some layers": (change_settings(layers_to_transform=0), "uses layers_to_transform: not supported"),
    "factors that PEFT would not read": (
        change_settings(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]),
        r"layers\.0\.mlp\.gate_proj has factors, but adapter_config.json's target_modules does not name it",
    ),
    "factors that PEFT would not read for the encoder": (
        change_settings(target_modules=r"model\.decoder\..*(proj|experts)"),
        r"layers\.0\.self_attn\.q_proj has factors, but adapter_config.json's target_modules does not name it",
    ),
    "experts that PEFT would not read": (
        change_settings(target_parameters=["1.experts.gate_up_proj", "experts.down_proj"]),
        r"layers\.0\.experts\.gate_up_proj has factors, but adapter_config.json's target_parameters does not",
    ),
    "factors that PEFT would miss": (
        change_settings(target_modules="all-linear"),
        r"layers\.0\.router\.proj has no factors, but adapter_config.json's target_modules names it",
    ),
    "no floating point": (
        change_tensors(lambda t: t.update({QUERY: t[QUERY].int()})),
        f"{QUERY} is I32, one of BF16, F16, F32, F64 was expected",
    ),
    "a missing copy": (change_tensors(lambda t: t.pop(QUERY)), f"{QUERY} is missing"),
    "unequal copies": (
        change_tensors(lambda t: t[QUERY].add_(1e-6)),
        "differ. Encoder and decoder share",
    ),
    "diverged": (
        change_tensors(lambda t: [t[key].fill_(torch.nan) for key in (QUERY, ENCODERS_QUERY)]),
        f"2 problems.*\n  {QUERY} holds NaN or infinity.*\n  {ENCODERS_QUERY} holds NaN or infinity",
    ),
    "another model": (
        change_tensors(lambda t: t.update({QUERY: torch.zeros(4, 50)})),
        r"q_proj.lora_A.weight has shape \(4, 50\), \(4, 48\) was expected",
    ),
    "a stranger": (
        change_tensors(lambda t: t.update({QUERY.replace("layers.0", "layers.9"): t[QUERY].clone()})),
        "layers.9.self_attn.q_proj.lora_A.weight is no adapter of a weight that this model has",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_an_adapter_that_cannot_be_used_is_named(what: str, base: Path, tmp_path: Path):
    write_random_adapter(tmp_path / "adapter", base, target_parameters=EXPERTS)
    spoil, said = SPOILT[what]
    spoil(tmp_path / "adapter")
    with pytest.raises(UserError, match=said):
        AdapterReader(tmp_path / "adapter", possible())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 8}, "lora.r = 8, but it was made with 4"),
        ({"lora_alpha": 1}, "lora.lora_alpha = 1.0, but it was made with 6.0"),
        ({"use_rslora": True}, "lora.use_rslora = True"),
        ({"target_modules": ["k_proj", "q_proj"]}, "layers.0.self_attn.k_proj and 1 more is adapted by this run only"),
        ({"target_modules": ["0.self_attn.q_proj"]}, "layers.1.self_attn.q_proj is adapted by it only"),
    ],
)
def test_a_run_that_would_continue_another_adapter_is_refused(settings, said, base: Path, tmp_path: Path):
    write_random_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    reader = AdapterReader(tmp_path / "adapter", possible())
    lora = LoraSection(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], **settings})
    stack = build_stack(make_config(CASE))
    with pytest.raises(UserError, match=said):
        check_continues(lora, choose_targets(stack, lora), reader.lora, reader.targets)
