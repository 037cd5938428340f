"""A run's config: what a file and `--set` mean, and what a person reads when they are wrong."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ds_dgemma.config.division import check_topology
from ds_dgemma.config.file import load_config
from ds_dgemma.config.recorded import check_same_run, resolved_yaml
from ds_dgemma.config.run import RunConfig
from ds_dgemma.config.schema import reference_markdown
from ds_dgemma.errors import UserError

REPOSITORY = Path(__file__).parents[1]
RUNS = sorted((REPOSITORY / "ds_configs" / "runs").glob("*.yaml"))

GOOD = """\
run: {dir: runs/x}
model: {path: model}
data:
  train: train.jsonl
train:
  max_steps: 100
  global_batch_size: 32
  micro_batch_size: 4
deepspeed: zero.json
"""


@pytest.fixture(autouse=True)
def _in_an_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("zero.json").write_text("{}")


def load(text: str = GOOD, *overrides: str) -> RunConfig:
    Path("sft.yaml").write_text(text)
    return load_config(Path("sft.yaml"), overrides)


def refusal(text: str = GOOD, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(text, *overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("optimizer.lr=1e-4", lambda c: c.optimizer.lr, 1e-4),  # text to YAML 1.1
        ("parallel.grouped_matmul=on", lambda c: c.parallel.grouped_matmul, "on"),  # true to YAML 1.1
        ("seed=010", lambda c: c.seed, 10),  # 8 to YAML 1.1
        ("train.max_steps=1e3", lambda c: c.train.max_steps, 1000),
        ("objective.canvases_per_example=all", lambda c: c.objective.canvases_per_example, "all"),
        ("objective.canvases_per_example=2", lambda c: c.objective.canvases_per_example, 2),
        ("optimizer.betas=[0.9, 0.99]", lambda c: c.optimizer.betas, (0.9, 0.99)),
        ("data.train=null.jsonl", lambda c: c.data.train[0].path, "null.jsonl"),
        ("data.train=[a.jsonl, {path: b, weight: 2}]", lambda c: [s.weight for s in c.data.train], [1, 2]),
        ("data.validation=null", lambda c: c.data.validation, None),
        ("data.columns={prompt: q, response: a}", lambda c: c.data.columns.response, "a"),
        ("tracking.wandb.name='12'", lambda c: c.tracking.wandb.name, "12"),
        ("lora={}", lambda c: c.lora.target_modules[0], "self_attn.q_proj"),
        ("lora.target_modules=all-linear", lambda c: c.lora.target_modules, "all-linear"),
        ("lora.target_modules=[mlp.up_proj]", lambda c: c.lora.target_modules, ("mlp.up_proj",)),
        ("lora.init_lora_weights=gaussian", lambda c: c.lora.init_lora_weights, "gaussian"),
        ("optimizer.groups=[{match: '*', lr: 1e-3}]", lambda c: c.optimizer.groups[0].lr, 1e-3),
    ],
)
def test_set_reads_a_value_as_yaml_and_wins_over_the_file(override, read, value) -> None:
    text = GOOD + "seed: 3\noptimizer: {lr: 0.1, betas: [0.5, 0.5], min_lr: 0}\n"
    found = read(load(text, override))
    assert found == value
    assert type(found) is type(value)


# Where each stands, the setting's name, and what to write instead where that can be known; no wording. A mistake that
# `bad_inputs.py` makes too is not made here, but for its place.
MISTAKES = [
    ("optimizer:\n  lear: 1", "sft.yaml:11 optimizer.lear optimizer.lr"),
    ("7: a", "sft.yaml:10 7"),
    ("optimiser: {lr: 1}", "sft.yaml:10 optimiser optimizer"),
    ("precision: fp32", "sft.yaml:10 precision train.precision"),
    ("optimizer.lr: 1", "sft.yaml:10 optimizer.lr lr: optimizer:"),
    ("seed: true", "sft.yaml:10 seed true"),
    ("seed: 1\nseed: 2", "sft.yaml:11 seed 10"),
    ("optimizer:", "sft.yaml:10 optimizer null"),
    ("optimizer: {betas: [0.9]}", "optimizer.betas [0.9] 2"),
    ("objective: {canvases_per_example: few}", "objective.canvases_per_example few all"),
    ("objective: {canvases_per_example: 0}", "objective.canvases_per_example = 0 ≥ 1 all"),
    ("checkpoint: {every: 100, keep_every: 250}", "sft.yaml:10 checkpoint keep_every 250 100"),
    ("checkpoint: {every: 0, keep_every: 5}", "sft.yaml:10 checkpoint keep_every 5"),
    ("checkpoint: {keep_best: 1}", "sft.yaml:10 checkpoint.keep_best 1 validation"),
    ("checkpoint: {on_error: ignore}", "checkpoint.on_error ignore stop continue"),
    ("lora: {rank: 8}", "sft.yaml:10 lora.rank"),
    ("lora: {r: true}", "sft.yaml:10 lora.r true"),
    ("lora: {init_lora_weights: eva}", "lora.init_lora_weights eva gaussian"),
    ("lora: {target_modules: '(a'}", "sft.yaml:10 lora target_modules (a"),
    ("lora: {target_modules: null}", "sft.yaml:10 lora"),
    ("lora: {lora_dropout: 0.1, target_parameters: [a]}", "sft.yaml:10 lora lora_dropout target_parameters"),
    ("optimizer:\n  groups:\n  - {match: a, lr: 0}", "sft.yaml:12 optimizer.groups.0.lr 0"),
    ("optimizer: {groups: [{match: a, rate: 1}]}", "optimizer.groups.0.rate"),
    ("optimizer: {groups: [{match: a}]}", "optimizer.groups.0 lr weight_decay"),
    (["train.precison=fp32"], "--set train.precison train.precision"),
    (["data.train=[a"], "--set data.train [a"),
    (["seed=!!timestamp foo"], "--set seed=!!timestamp foo"),
    (["seed=!!binary /w=="], "--set seed = b'"),
    (["optimizer={lr: 1, lr: 2}"], "--set lr is set twice"),
    ("optimizer: {lr: 1e-6}", "sft.yaml:10 optimizer.lr min_lr"),
    (["train={max_steps: 1}"], "--set train.micro_batch_size"),
    (["train.micro_batch_size=5"], "train.global_batch_size 32 1, 2, 4, 8"),
    (["model.freeze=['re:(']"], "--set model.freeze"),
    (["lora={}", "model.train_router=true"], "--set model.train_router lora"),
    (
        ["checkpoint={keep_best: 1, every: 3}", "data.validation=x", "validation.every=5", "train.max_steps=14"],
        "checkpoint.keep_best 14",
    ),
    (["checkpoint.best_by=validation/los"], "checkpoint.best_by loss_diffusion_at_0.5"),
    (["train.early_stopping_patience=2"], "train.early_stopping_patience validation.every"),
    (["objective.noise_eps=0.7", "objective.noise_max=0.5"], "--set objective noise_max 0.5 noise_eps 0.7"),
    (["deepspeed=none.json"], "deepspeed none.json"),
]


@pytest.mark.parametrize(("mistake", "named"), MISTAKES, ids=str)
def test_each_mistake_is_told_with_its_place_and_remedy(mistake, named) -> None:
    text = refusal(GOOD + mistake) if isinstance(mistake, str) else refusal(GOOD, *mistake)
    assert any(all(word in line for word in named.split(" ")) for line in text.splitlines()), text


def test_all_problems_are_told_at_once_in_the_order_of_the_file() -> None:
    lines = refusal("seed: x\nrun: {dirr: a}\n", "train.max_steps=0").splitlines()
    assert lines[0] == "9 problems in sft.yaml"
    places = [line.split()[0] for line in lines[1:]]
    assert places[:3] == ["sft.yaml:1", "sft.yaml:2", "sft.yaml:2"]
    assert {"--set", "sft.yaml"} == set(places[3:])


def test_a_wrong_type_hides_neither_a_boolean_nor_what_two_settings_say_together() -> None:
    mistakes = [
        "optimizer.lrr=1",
        "train.global_batch_size=65",
        "train.micro_batch_size=2",
        "tracking.console_every=true",
        "seed=-1",
    ]
    heading, *lines = refusal(GOOD, *mistakes, "health.spike_window=few").splitlines()
    assert heading == "5 problems in sft.yaml"
    for words in ("optimizer.lrr", "65", "console_every = true", "spike_window"):
        assert any(words in line for line in lines), words


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "sft.yaml does not exist"),
        (b"", "sft.yaml holds no settings: it is empty"),
        (b"- a\n", "sft.yaml holds no settings: it starts as a list"),
        (b"seed: 1\nrun: [\n", "sft.yaml:3 is not valid YAML"),
        (b"a: !!python/name:os.system x\n", "sft.yaml:1 is not valid YAML"),
        (b"run: {dir: a}\n? [b]\n: 1\n", "sft.yaml:2 is not valid YAML"),
        (b"&a {b: *a}\n", "sft.yaml:1 is not valid YAML"),
        (b"seed: " + b"[" * 3000, "sft.yaml is not valid YAML"),
        (b"a: \x00\n", "sft.yaml is not valid YAML in UTF-8: unacceptable character"),
        (b"a: \xff\n", "sft.yaml is not valid YAML in UTF-8: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(content, said) -> None:
    if content is not None:
        Path("sft.yaml").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(said)):
        load_config(Path("sft.yaml"))


def test_the_resolved_config_reads_back_the_same_with_any_yaml_reader() -> None:
    names = [f"tracking.wandb.tags={tag!r}" for tag in [["on", "1e-4", "0o7", "010", "null", "true", "1:30"]]]
    config = load(GOOD, *names, "model.revision='12e4567'", "optimizer.eps=1e-9")
    text = resolved_yaml(config)
    assert load(text) == config
    assert RunConfig.model_validate(yaml.safe_load(text)) == config


@pytest.mark.parametrize(("ranks", "micro", "accumulation"), [(1, 4, 8), (2, 4, 4), (8, 4, 1), (4, 2, 4)])
def test_accumulation_follows_from_the_batch_and_the_ranks(ranks, micro, accumulation) -> None:
    assert check_topology(load(GOOD, f"train.micro_batch_size={micro}"), ranks) == accumulation


@pytest.mark.parametrize(
    ("overrides", "ranks", "said"),
    [
        ([], 16, "is not a multiple of 64, train.micro_batch_size 4 × 16 ranks"),
        ([], 16, "Set train.global_batch_size 64, or train.micro_batch_size 1 or 2."),
        ([], 3, "Set train.global_batch_size 24 or 36."),
        (["parallel.expert_parallel_size=3"], 8, "does not divide 8 ranks. Set 1, 2, 4 or 8"),
        (["parallel.expert_parallel_size=2"], 1, "does not divide 1 rank. Set 1"),
    ],
)
def test_a_topology_that_does_not_fit_is_told_with_those_that_do(overrides, ranks, said) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        check_topology(load(GOOD, *overrides), ranks)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=1", "seed: run directory has 0, this config says 1"),
        ("optimizer.lr=1", "optimizer.lr: run directory has 0.00015, this config says 1.0"),
        (
            "train.max_steps=7",
            "train.max_steps: run directory has 100, this config says 7 (the learning rate's",
        ),
        ("train.precision=fp32", 'train.precision: run directory has "bf16"'),
        ("data.columns={prompt: q, response: a}", "data.columns: run directory has null"),
        ("lora={}", "lora: run directory has null"),
        ("model.freeze=['*']", "model.freeze: run directory has []"),
        ("optimizer.groups=[{match: '*', lr: 1}]", "optimizer.groups: run directory has []"),
        ("run.resume=never", None),
        ("model.path=elsewhere", None),
        ("train.micro_batch_size=1", None),
        ("parallel.expert_parallel_size=8", None),
        ("objective.logits_chunk_mib=1", None),
        ("data.workers=0", None),
        ("data.validation=held-out.jsonl", None),
        ("tracking.wandb.mode=offline", None),
    ],
)
def test_within_a_run_only_settings_that_change_no_number_may_change(override, said) -> None:
    Path("config.yaml").write_text(resolved_yaml(load()))
    config = load(GOOD, override)
    if said is None:
        check_same_run(Path("config.yaml"), config)
        return
    with pytest.raises(UserError) as error:
        check_same_run(Path("config.yaml"), config)
    problem = str(error.value).splitlines()[1:-1]
    assert len(problem) == 1
    assert problem[0].strip().startswith(said)


def test_a_run_older_than_a_setting_counts_as_having_its_default() -> None:
    Path("config.yaml").write_text(GOOD)
    check_same_run(Path("config.yaml"), load())
    with pytest.raises(UserError, match="noise_eps"):
        check_same_run(Path("config.yaml"), load(GOOD, "objective.noise_eps=0.1"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_the_run_configs_we_ship_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    load_config(path)


def test_the_reference_is_up_to_date() -> None:
    written = (REPOSITORY / "ds_configs" / "reference.md").read_text()
    assert written.strip() == reference_markdown(), "run: ds-dgemma config-reference > ds_configs/reference.md"


def test_a_config_is_checked_without_torch_or_deepspeed() -> None:
    code = "import sys, ds_dgemma.config.file; sys.exit(bool({'torch', 'deepspeed'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
