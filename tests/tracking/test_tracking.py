"""What tracking promises: exact lines, a clean cut on resume, a bar or lines, pictures of a run."""

import json
import math
import os
import random
import re
import signal
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from ds_dgemma.config.tracking import TrackioSection, WandbSection
from ds_dgemma.errors import UserError
from ds_dgemma.tracking.metrics import START, StepMetrics, memory_gib, peak_flops, read_lines
from ds_dgemma.tracking.plots import plot_runs, smooth
from ds_dgemma.tracking.services import wandb
from ds_dgemma.tracking.services.tensorboard import TensorBoard
from ds_dgemma.tracking.services.trackio import Trackio
from ds_dgemma.tracking.services.wandb import Wandb
from ds_dgemma.tracking.sinks import ConsoleSink, JsonlSink, Tracker
from tests.training import REPOSITORY

NAMES = "step loss loss_diffusion loss_ar grad_norm lr samples tokens seconds tokens_per_second memory_gib mfu"


def metrics(step: int, loss: float = 1.5) -> StepMetrics:
    return StepMetrics(step, loss, 1.0, 0.5, 0.25, 1e-3, step * 8, 1000, 0.5, 2000.0, 0.75)


def write_steps(path: Path, steps: range) -> None:
    with Tracker([JsonlSink(path, keep_through_step=steps.start - 1)], pytest.fail) as tracker:
        for step in steps:
            tracker.track(metrics(step))


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_step_is_written_under_the_fixed_names(tmp_path: Path) -> None:
    write_steps(tmp_path / "metrics.jsonl", range(1, 2))
    assert list(json.loads((tmp_path / "metrics.jsonl").read_text())) == NAMES.split()
    assert [field.name for field in fields(StepMetrics)] == [*NAMES.split(), "loss_router"]  # written where it is on


FULL = """
import resource, sys
from pathlib import Path
from ds_dgemma.tracking.sinks import JsonlSink, Tracker
path, patient, refusals = Path(sys.argv[1]), sys.argv[2] == "patient", []
tracker = Tracker([JsonlSink(path, 0, patient)], refusals.append)
for step in range(1, 9):
    room = 100 if 3 <= step <= 6 else resource.RLIM_INFINITY  # as a disk that fills up and gets room again
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    tracker.track({"step": step, "loss": 0.5, "text": "x" * 20})
tracker.__exit__(None)
print(len(refusals))
"""


@pytest.mark.parametrize(("patience", "refused"), [("patient", 0), ("impatient", 4)])
def test_a_line_that_a_full_disk_refuses_is_told_and_written_later_whole(patience, refused, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + FULL]
    ended = subprocess.run([*command, tmp_path / "m.jsonl", patience], capture_output=True, text=True, cwd=REPOSITORY)
    assert (ended.returncode, ended.stdout) == (0, f"{refused}\n"), ended.stderr
    assert ended.stderr.count("metrics cannot be written") == (1 if patience == "patient" else 0)
    assert steps_in(tmp_path / "m.jsonl") == list(range(1, 9))


def test_floats_come_back_bit_for_bit(tmp_path: Path) -> None:
    draw = random.Random(0)
    values = [struct.unpack("<d", draw.randbytes(8))[0] for _ in range(2000)] + [5e-324, -0.0, 0.1 + 0.2]
    sink = JsonlSink(tmp_path / "m.jsonl", keep_through_step=0)
    for step, value in enumerate(values):
        sink.write({"step": step, "value": value})
    sink.close(failed=False)
    read = [float(record["value"]) for _, record in read_lines(tmp_path / "m.jsonl")]
    for written, found in zip(values, read, strict=True):
        same_bits = struct.pack("<d", written) == struct.pack("<d", found)
        assert same_bits or (math.isnan(written) and math.isnan(found))


def test_a_line_stays_valid_json_when_the_loss_is_not_finite(tmp_path: Path) -> None:
    with Tracker([JsonlSink(tmp_path / "m.jsonl", 0)], pytest.fail) as tracker:
        tracker.track(metrics(1, loss=float("-inf")))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=refuse)
    assert line["loss"] is None
    assert line["not_finite"] == {"loss": "-inf"}
    ((_, record),) = read_lines(tmp_path / "m.jsonl")
    assert {**record, "loss_router": None} == asdict(metrics(1, loss=float("-inf")))


def test_resuming_cuts_back_to_the_checkpoint_and_keeps_the_rest_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 8))
    with path.open("a") as file:
        file.write('{"kind": "validation", "step": 7, "loss": 1}\n{"step": 8, "lo')  # torn by SIGKILL
    before = path.read_bytes().splitlines(keepends=True)
    sink = JsonlSink(path, keep_through_step=5)
    assert path.read_bytes().splitlines(keepends=True) == before[:5]
    sink.write(asdict(metrics(6)))
    sink.close(failed=False)
    assert steps_in(path) == [1, 2, 3, 4, 5, 6]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_start_that_is_repeated_is_told_once_and_those_before_it_stay(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"

    def start(after: int, steps: Iterable[int]) -> None:
        sink = JsonlSink(path, keep_through_step=after)
        sink.write({"kind": START, "step": after, "full_attention": "sdpa"})
        for step in steps:
            sink.write(asdict(metrics(step)))
        sink.close(failed=False)

    start(0, ())  # ended while it loaded the model
    start(0, range(1, 5))
    start(3, (4, 5))
    start(3, (4, 5, 6))
    found = [(record.get("kind"), record["step"]) for _, record in read_lines(path)]
    steps = [(None, step) for step in range(1, 7)]
    assert found == [(START, 0), *steps[:3], (START, 3), *steps[3:]]


def test_a_damaged_line_inside_the_file_is_named_and_nothing_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        JsonlSink(path, keep_through_step=1)
    assert path.read_text() == '{"step": 1}\n{"st\n{"step": 3}\n'


def test_a_killed_process_has_written_every_step_it_reported(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    program = (
        "import sys, itertools; from pathlib import Path; from ds_dgemma.tracking.sinks import JsonlSink\n"
        "sink = JsonlSink(Path(sys.argv[1]), 0)\n"
        "for step in itertools.count(1): sink.write({'step': step}); print(step, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        reported = int([child.stdout.readline() for _ in range(500)][-1])
        child.send_signal(signal.SIGKILL)
    whole = [int(record["step"]) for _, record in read_lines(path)]
    assert len(whole) >= reported
    assert whole == list(range(1, len(whole) + 1))


def test_without_a_terminal_the_console_gets_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Tracker([ConsoleSink(total_steps=25, start_step=3, every=10)], pytest.fail) as tracker:
        for step in range(4, 26):
            tracker.track(metrics(step))
        tracker.track({"kind": "validation", "step": 25, "loss_diffusion": 0.125})
    lines = capsys.readouterr().out.splitlines()
    assert [line[:10] for line in lines[:-1]] == ["step  4/25", "step 10/25", "step 20/25", "step 25/25"]
    for shown in (
        "loss 1.5000",
        "diffusion 1.0000",
        "ar 0.5000",
        "grad 0.25",
        "lr 1.00e-03",
        "2,000 tok/s",
        "left",
    ):
        assert shown in lines[0]
    assert lines[-1] == "validation at step 25: loss_diffusion 0.1250"


def test_on_a_terminal_the_console_shows_a_bar_with_losses_speed_and_time_left(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    leader, follower = os.openpty()
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        with Tracker([ConsoleSink(total_steps=3, start_step=0, every=1)], pytest.fail) as tracker:
            for step in (1, 2, 3):
                tracker.track(metrics(step))
        monkeypatch.undo()
        cursor_restored, shown = b"\x1b[?25h", b""
        while cursor_restored not in shown:
            shown += os.read(leader, 4096)
    os.close(leader)
    for part in ("3/3", "1.500", "1.000", "0.500", "2,000", "tok/s", "0:00 left", "━"):
        assert part in shown.decode()
    assert "step 1/3" not in shown.decode()


def test_wandb_offline_keeps_the_run_id_and_survives_a_step_it_has_seen(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    secrets = {"WANDB_API_KEY": "0123456789abcdef" * 2 + "deadbeef", "HF_TOKEN": "hf_" + "Abc123" * 6}
    for name, secret in secrets.items():
        monkeypatch.setenv(name, secret)
    config = WandbSection(mode="offline", project="tests")
    for steps in (range(1, 6), range(3, 8)):  # the second one resumed from step 2
        with Tracker([Wandb(config, tmp_path, {"seed": 1, "train": {"max_steps": 7}})], pytest.fail) as tracker:
            for step in steps:
                tracker.track(metrics(step))
                tracker.track({"kind": "validation", "step": step, "loss": 1.0})
            tracker.track({"kind": "evaluation", "step": steps[-1], "exact": 1.0, "answers": [{"answer": "It is 7."}]})
            tracker.track(metrics(steps.start))  # older than what was logged: left out, not an error
    run_id = (tmp_path / "wandb_id").read_text().strip()
    written = [path.name for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb")]
    assert written == [f"run-{run_id}.wandb"] * 2
    tables = [json.loads(path.read_text()) for path in tmp_path.rglob("evaluation/answers*.table.json")]
    assert [(table["columns"], table["data"]) for table in tables] == [(["answer"], [["It is 7."]])] * 2
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        assert not [name for name, secret in secrets.items() if secret.encode() in path.read_bytes()], path


def test_wandb_that_cannot_start_says_what_to_do(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers, on any machine
    monkeypatch.setattr(wandb, "START_SECONDS", 2)
    with pytest.raises(UserError, match="offline"):
        Wandb(WandbSection(mode="online"), tmp_path, {})


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, steps in ((0, range(1, 6)), (2, range(3, 8))):
        with Tracker([TensorBoard(tmp_path, {"seed": 1}, start)], pytest.fail) as tracker:
            for step in steps:
                tracker.track(metrics(step, loss=start + step))
            tracker.track({"kind": "evaluation", "step": steps[-1], "exact": 1.0, "answers": [{"answer": "a|b\nc"}]})
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        *((step, step) for step in (1, 2)),
        *((step, 2 + step) for step in range(3, 8)),
    ]
    assert [event.value for event in events.Scalars("evaluation/exact")] == [1.0]
    shown = [event.tensor_proto.string_val[0] for event in events.Tensors("evaluation/answers/text_summary")]
    assert shown[-1:] == [b"| answer |\n| --- |\n| a\\|b<br>c |"]


TRACKIO = """
import sys
from pathlib import Path
from ds_dgemma.config.tracking import TrackioSection
from ds_dgemma.tracking.services.trackio import Trackio
folder, told, begin, end = Path(sys.argv[1]), *map(int, sys.argv[2:])
service = Trackio(TrackioSection(project="tests", name="run"), folder, {"seed": 1}, told)
for step in range(begin, end):
    service.write({"step": step, "loss": 0.5})
service.write({"kind": "evaluation", "step": end - 1, "answers": [{"answer": "It is 7."}]})
service.close(False)
"""


def test_trackio_has_each_step_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    for begin in ("0 1 6", "5 3 8"):
        command = [sys.executable, "-c", TRACKIO, str(tmp_path), *begin.split()]
        subprocess.run(command, check=True, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    (database,) = (tmp_path / "trackio").glob("tests*.db")
    with sqlite3.connect(database) as rows:
        found = [
            (step, json.loads(text)) for step, text in rows.execute("SELECT step, metrics FROM metrics ORDER BY id")
        ]
    assert [step for step, values in found if "loss" in values] == list(range(1, 8))
    assert sum("It is 7." in str(values) for _, values in found) == 2


def test_a_service_whose_package_is_missing_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    for module in ("trackio", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install 'ds-dgemma\[trackio\]'"):
        Trackio(TrackioSection(), tmp_path, {}, 0)
    with pytest.raises(UserError, match=r"pip install 'ds-dgemma\[tensorboard\]'"):
        TensorBoard(tmp_path, {}, 0)


def test_memory_is_in_gib_and_at_least_what_is_resident_now() -> None:
    resident = psutil.Process().memory_info().rss / 2**30
    assert resident * 0.99 <= memory_gib(torch.device("cpu")) <= psutil.virtual_memory().total / 2**30


def test_smoothing_keeps_a_constant_and_skips_a_gap() -> None:
    assert np.allclose(smooth(np.full(40, 3.0), deviation=4.0), 3.0)
    gap = np.array([1.0, np.nan, 3.0])
    assert np.isfinite(smooth(gap, deviation=1.0)).all()
    assert np.allclose(smooth(np.array([7.0]), deviation=1.0), 7.0)


def test_runs_are_drawn_over_one_another_with_what_was_measured_beside_the_losses(tmp_path: Path) -> None:
    for name, count in (("one", 1), ("two", 30)):
        (tmp_path / name).mkdir()
        write_steps(tmp_path / name / "metrics.jsonl", range(1, count + 1))
    out = plot_runs([tmp_path / "one", tmp_path / "two"])
    assert out == tmp_path / "one" / "plots" / "curves.png"
    assert out.read_bytes().startswith(b"\x89PNG")
    plain = plot_runs([tmp_path / "two"], tmp_path / "new" / "x.html").read_text()
    with (tmp_path / "two" / "metrics.jsonl").open("a") as file:
        for kind in (
            {"kind": "validation", "loss_diffusion_at_0.1": 0.1, "loss_diffusion_at_0.9": 2.0, "accuracy": 0.5},
            {"kind": "evaluation", "examples": 4, "exact": 0.25, "stopped": 1.0, "steps_per_canvas": 9.0},
        ):
            file.write(json.dumps({"step": 30, **kind}) + "\n")
    full = plot_runs([tmp_path / "two"], tmp_path / "new" / "x.html").read_text()
    shown = ("Diffusion loss by noise level", "t = 0.9", "Answers", "exact", "stopped", "tokens denoised right")
    assert [(words in plain, words in full) for words in shown] == [(False, True)] * len(shown)
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|<metadata>.*?</metadata>', "", full, flags=re.DOTALL)
    with pytest.raises(UserError, match=r"ends in \.png or \.html"):
        plot_runs([tmp_path / "two"], tmp_path / "x.pdf")


def test_a_run_without_metrics_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
        plot_runs([tmp_path])
    (tmp_path / "metrics.jsonl").write_text('{"kind": "validation", "step": 1}\n')
    with pytest.raises(UserError, match="no step yet"):
        plot_runs([tmp_path])


@pytest.mark.parametrize(
    ("name", "said", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", None, 989e12),
        ("NVIDIA H100 PCIe", None, 756e12),
        ("NVIDIA A100-SXM4-80GB", None, 312e12),
        ("NVIDIA GeForce RTX 4090", None, 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None, None),
        ("NVIDIA H20", None, None),
        (None, None, None),
        (None, 0.05, 5e10),
    ],
)
def test_the_peak_is_the_cards_or_what_was_said(name: str | None, said: float | None, peak: float | None) -> None:
    assert peak_flops(name, said) == peak
