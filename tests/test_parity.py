"""Our backbone and objective give transformers' numbers, and the script that says so can say no."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import parity
from tests.reference.fixtures import CASES, write_case
from tests.reference.lora import write_lora
from tests.training import start_module

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "oracle" / "fixtures"


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cases")
    for name, case in CASES.items():
        write_case(folder / name, case)
    return folder


@pytest.fixture(scope="session")
def lora_cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cases with an adapter, made by PEFT on transformers."""
    folder = tmp_path_factory.mktemp("lora")
    for name in ("base", "many_experts"):
        write_case(folder / name, CASES[name])
        write_lora(folder / name)
    return folder


@pytest.fixture
def lora(lora_cases: Path, tmp_path: Path) -> Path:
    """A copy of one case with an adapter, alone in its folder and free to be spoilt."""
    shutil.copytree(lora_cases / "base", tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def base(cases: Path, tmp_path: Path) -> Path:
    """A copy of one case, alone in its folder and free to be spoilt."""
    shutil.copytree(cases / "base", tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(scope="session")
def recorded() -> Path:
    """Cases recorded elsewhere, from a directory that DS_DGEMMA_ORACLE names or that lies beside the repository."""
    folder = Path(os.environ.get("DS_DGEMMA_ORACLE", BESIDE))
    if not any(folder.glob("*/case.safetensors")):
        pytest.skip(f"needs recorded parity cases: DS_DGEMMA_ORACLE, or {BESIDE}")
    return folder


def run_parity(cases: Path, *options: str) -> tuple[int, str]:
    """Run the script as a user would; its exit code and all that it printed."""
    command = [sys.executable, parity.__file__, str(cases), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=cases)
    return done.returncode, done.stdout + done.stderr


def run_ranks(cases: Path, count: int, log: Path) -> tuple[int, str]:
    """The ranks that the script would start."""
    ranks = start_module(["tests.parity", str(cases), "--ep", str(count), "--is-rank"], count, log)
    return max(rank.wait(600) for rank in ranks), log.read_text()


def test_float64_equals_transformers(cases: Path):
    assert parity.main([str(cases), "--dtype", "float64"]) == 0


@pytest.mark.slow
def test_float32_under_zero3_equals_transformers(cases: Path, tmp_path: Path):
    code, printed = run_ranks(cases, 1, tmp_path / "log")
    assert code == 0, printed
    assert f"all {len(CASES)} cases within tolerance" in printed


@pytest.mark.slow
def test_float32_under_expert_parallelism_equals_transformers_but_for_what_is_spoilt_on_one_rank(
    cases: Path, base: Path, tmp_path_factory: pytest.TempPathFactory
):
    spoil_tensors("case.safetensors", "expected.all.pass2_logits", lambda t: t[3, 0, 0].add_(0.1))(base)  # rank 1's row
    for name in CASES.keys() - {"base"}:
        (base.parent / name).symlink_to(cases / name)
    (base.parent / "whole").symlink_to(cases / "base")
    code, printed = run_ranks(base.parent, 2, tmp_path_factory.mktemp("ranks") / "log")
    assert code == 1, printed
    assert f"1 of {len(CASES) + 1} FAILED" in printed
    assert "ABOVE TOLERANCE: pass-2 logits" in printed


def test_float64_lora_equals_peft_on_transformers(lora_cases: Path):
    assert parity.main([str(lora_cases), "--lora", "--dtype", "float64"]) == 0


@pytest.mark.slow
def test_float32_lora_under_zero3_and_expert_parallelism_equals_peft_on_transformers(lora_cases: Path):
    code, printed = run_parity(lora_cases, "--lora", "--ep", "2")
    assert code == 0, printed
    assert "all 2 cases within tolerance" in printed


@pytest.mark.parametrize("lora", [[], ["--lora"]], ids=["full", "lora"])
def test_float64_equals_the_recorded_cases(recorded: Path, lora: list[str]):
    assert parity.main([str(recorded), *lora, "--dtype", "float64"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("lora", [[], ["--lora"]], ids=["full", "lora"])
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_float32_equals_the_recorded_cases(recorded: Path, ranks: str, lora: list[str]):
    code, printed = run_parity(recorded, *lora, "--ep", ranks)
    assert code == 0, printed


def spoil_tensors(file: str, name: str, change: Callable[[torch.Tensor], object]) -> Callable[[Path], None]:
    """A change to one tensor of a safetensors file, in place."""

    def spoil(case: Path) -> None:
        tensors = load_file(case / file)
        change(tensors[name])
        save_file(tensors, case / file)

    return spoil


def spoil_norms(change: Callable[[dict[str, float]], object]) -> Callable[[Path], None]:
    """A change to the gradient norms of the mixed coins."""

    def spoil(case: Path) -> None:
        norms = json.loads((case / "grad_norms.json").read_text())
        change(norms["mixed"])
        (case / "grad_norms.json").write_text(json.dumps(norms))

    return spoil


QUERY = "model.decoder.layers.0.self_attn.q_proj.weight"
SPOILT = {
    "diffusion loss": spoil_tensors("case.safetensors", "expected.all.diffusion_loss", lambda t: t.add_(1e-8)),
    "AR loss": spoil_tensors("case.safetensors", "expected.mixed.ar_loss", lambda t: t.sub_(1e-8)),
    "pass-2 logits": spoil_tensors("case.safetensors", "expected.none.pass2_logits", lambda t: t[0, 0, 0].add_(1e-4)),
    "encoder lse": spoil_tensors("case.safetensors", "expected.encoder_logsumexp", lambda t: t[1, 2].add_(1e-8)),
    "not a number": spoil_tensors(
        "case.safetensors", "expected.none.pass2_logits", lambda t: t[2, 1, 0].fill_(torch.nan)
    ),
    "weight": spoil_tensors("model/model.safetensors", QUERY, lambda t: t[3, 5].add_(1e-3)),
    "gradient norm": spoil_norms(lambda norms: norms.update({QUERY: norms[QUERY] * (1 + 1e-5)})),
    "gradient that is not a number": spoil_norms(lambda norms: norms.update({QUERY: float("nan")})),
    "gradient that we lack": spoil_norms(lambda norms: norms.update({"model.decoder.extra": 1.0})),
    "gradient that they lack": spoil_norms(lambda norms: norms.pop(QUERY)),
}


@pytest.mark.parametrize("what", SPOILT)
def test_one_wrong_expectation_fails(base: Path, what: str, capsys: pytest.CaptureFixture[str]):
    SPOILT[what](base)
    assert parity.main([str(base.parent), "--dtype", "float64"]) == 1
    assert "ABOVE TOLERANCE" in capsys.readouterr().out


FACTOR = "model.decoder.layers.1.experts.base_layer.lora_A.weight"
SPOILT_LORA = {
    "factor": spoil_tensors("lora.safetensors", FACTOR, lambda t: t[3, 5].add_(1e-3)),
    "element of a gradient": spoil_tensors(
        "lora.safetensors", f"expected.mixed.grad.{FACTOR}", lambda t: t[3, 5].add_(1e-5 * t.abs().max())
    ),
    "logits": spoil_tensors("lora.safetensors", "expected.all.pass2_logits", lambda t: t[0, 0, 0].add_(1e-4)),
}


@pytest.mark.parametrize("what", SPOILT_LORA)
def test_one_wrong_expectation_of_an_adapter_fails(lora: Path, what: str, capsys: pytest.CaptureFixture[str]):
    SPOILT_LORA[what](lora)
    assert parity.main([str(lora.parent), "--lora", "--dtype", "float64"]) == 1
    assert "ABOVE TOLERANCE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda case: shutil.rmtree(case), "holds no case"),
        (lambda case: (case / "grad_norms.json").unlink(), "no whole case: [Errno 2] No such file"),
        (lambda case: (case / "grad_norms.json").write_text("{"), "no whole case"),
        (lambda case: (case / "case.safetensors").write_bytes(b"cut"), "no whole case"),
        (lambda case: shutil.rmtree(case / "model"), "does not exist"),
        (lambda case: (case / "model" / "model.safetensors").unlink(), "holds no weights"),
    ],
    ids=["no case", "no norms", "broken norms", "broken tensors", "no checkpoint", "no weights"],
)
def test_cases_that_cannot_be_read_are_told_in_one_line(
    base: Path, break_it: Callable[[Path], object], message: str, capsys: pytest.CaptureFixture[str]
):
    break_it(base)
    assert parity.main([str(base.parent), "--dtype", "float64"]) == 2
    told = capsys.readouterr().err.strip()
    assert message in told
    assert "\n" not in told
