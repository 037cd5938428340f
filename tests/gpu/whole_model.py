"""LoRA on the released model at its whole depth: random weights, `ds_configs/runs/lora_26b*.yaml` as they stand.

    python -m tests.gpu.whole_model [--rehearse]

The checkpoint has the released shapes with all 30 layers (52 GB, in memory where /dev/shm has room). Training goes
through the `deepspeed` launcher: four steps of one micro-batch, whose rows fill `data.max_length`. The peak of memory
stands beside what `ds-dgemma plan` says of the same config. Then `ds-dgemma generate --run` answers with what was
trained.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from transformers import AutoTokenizer, DiffusionGemmaConfig

from ds_dgemma.config.file import load_config
from ds_dgemma.plan.plan import RELEASED_SHAPES
from ds_dgemma.ranks.layout import free_port
from tests.benchmarks.real_checkpoint import make_checkpoint
from tests.gpu import ROOT, shapes

RUNS = ("lora_26b", "lora_26b_24gb")
STEPS, ROWS = 4, 2
ROOM = 60e9  # bytes: the checkpoint, and what the runs leave beside it
GIB = 2**30
CLI = ("-c", "import sys; from ds_dgemma.cli import main; sys.exit(main())")  # also where nothing is installed


def roomy() -> str:
    """A folder that has room for the checkpoint: in memory if possible."""
    for folder in ("/dev/shm", tempfile.gettempdir()):
        if Path(folder).is_dir() and shutil.disk_usage(folder).free > ROOM:
            return folder
    raise SystemExit(f"neither /dev/shm nor {tempfile.gettempdir()} has {ROOM / 1e9:.0f} GB free")


def write_rows(model: Path, length: int, out: Path) -> None:
    """Conversations of a little more than `length` tokens, of which a quarter is the answer."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer((ROOT / "README.md").read_text() * (1 + length // 1000)).input_ids[: length + 8]
    parts = tokenizer.decode(ids[: length * 3 // 4]), tokenizer.decode(ids[length * 3 // 4 :])
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), parts, strict=True)]
    out.write_text((json.dumps({"messages": turns}) + "\n") * STEPS * ROWS)


def run_config(name: str, folder: Path, length: int) -> list[str]:
    """A run's config, with what belongs to this machine."""
    settings = {
        "run.dir": folder / name,
        "model.path": folder / "model",
        "data.train": folder / f"{name}.jsonl",
        "data.max_length": length,
        "data.over_length": "truncate",
        "train.max_steps": STEPS,
        "train.global_batch_size": ROWS,
        "train.micro_batch_size": ROWS,
        "checkpoint.every": 0,
    }
    overrides = (part for key, value in settings.items() for part in ("--set", f"{key}={value}"))
    return ["--config", f"ds_configs/runs/{name}.yaml", *overrides]


def train(name: str, folder: Path, length: int) -> str:
    """Train through the launcher; its figures."""
    write_rows(folder / "model", length, folder / f"{name}.jsonl")
    config = run_config(name, folder, length)
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", str(free_port())]
    began = time.monotonic()
    start([*launcher, "--module", "ds_dgemma.train", *config], sys.stderr)
    took = time.monotonic() - began
    with (folder / "plan.json").open("w") as out:
        start([*CLI, "plan", *config, "--gpus", "1", "--json"], out)
    planned = json.loads((folder / "plan.json").read_text())["memory"]
    records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "kind" not in record]
    assert [math.isfinite(step["loss"]) for step in steps] == [True] * STEPS, steps
    last, seconds = steps[-1], statistics.median(step["seconds"] for step in steps[1:])
    mfu = f", MFU {last['mfu']:.1%}" if last["mfu"] else ""
    return (
        f"{name}.yaml, {last['tokens']:,} tokens a step: {seconds:.2f} s{mfu}; peak memory "
        f"{last['memory_gib']:.1f} GiB (planned {planned['peak'] / GIB:.1f}); all but the steps, from the launcher to "
        f"the checkpoint written, {took - sum(step['seconds'] for step in steps):.0f} s"
    )


def answer(name: str, folder: Path, new_tokens: int) -> str:
    """An answer of the trained model; its figures."""
    asked, out = folder / "asked.jsonl", folder / "answered.jsonl"
    asked.write_text(json.dumps({"messages": [{"role": "user", "content": "What is ZeRO-3?"}]}) + "\n")
    began = time.monotonic()
    options = ["--file", str(asked), "--out", str(out), "--max-new-tokens", str(new_tokens)]
    start([*CLI, "generate", "--run", str(folder / name), *options], sys.stderr)
    json.loads(out.read_text())
    return f"generate --run: {new_tokens} tokens in {time.monotonic() - began:.0f} s, start included"


def start(arguments: list[str], out: object) -> None:
    """A Python program; its failure ends the check."""
    subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=out, check=True)


def main() -> int:
    """Make the checkpoint, train both configs, answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="a miniature on the CPU")
    rehearse = parser.parse_args().rehearse
    with tempfile.TemporaryDirectory(dir=None if rehearse else roomy()) as name:
        folder, began = Path(name), time.monotonic()
        whole = DiffusionGemmaConfig.from_dict(json.loads(RELEASED_SHAPES.read_text()))
        make_checkpoint(shapes.config(True, 2) if rehearse else whole, folder / "model")
        print(f"made the checkpoint in {time.monotonic() - began:.0f} s", flush=True)
        for run in RUNS:
            length = 192 if rehearse else load_config(ROOT / f"ds_configs/runs/{run}.yaml").data.max_length
            print(f"FIGURE {train(run, folder, length)}", flush=True)
        print(f"FIGURE {answer(RUNS[0], folder, 16 if rehearse else 256)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
