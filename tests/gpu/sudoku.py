"""A short run of the demo (Muon) through the `deepspeed` launcher, one process, bf16: its loss must fall.

python -m tests.gpu.sudoku [--rehearse]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from ds_dgemma.data.sudoku import write_sudoku
from ds_dgemma.ranks.layout import free_port
from ds_dgemma.tools.tiny import make_tiny
from tests.gpu import ROOT

SHARE_LEFT = 0.8  # of the first steps' loss, at most


def main() -> int:
    """Train; 1 when the launcher fails or the loss does not fall."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true")
    steps, batch = (6, 16) if parser.parse_args().rehearse else (60, 32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tiny("sudoku4", folder / "model")
        write_sudoku(4, "train", batch * steps, 1, folder / "train.jsonl")
        settings = {
            "run.dir": folder / "run",
            "model.path": folder / "model",
            "data.train": folder / "train.jsonl",
            "train.max_steps": steps,
            "train.global_batch_size": batch,
            "train.micro_batch_size": batch,
            "train.precision": "bf16",
            "optimizer.warmup_steps": 5,
            "parallel.expert_parallel_size": 1,
            "checkpoint.every": 0,
        }
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", free_port()]
        command += ["--module", "ds_dgemma.train", "--config", "ds_configs/runs/sudoku.yaml"]
        command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        code = subprocess.run(list(map(str, command)), cwd=ROOT, stdout=sys.stderr, stderr=sys.stderr).returncode
        if code:
            print(f"FIGURE the launcher exited with {code}")
            return 1
        records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        start = records[0]
        seen = [record for record in records if "kind" not in record]
    few = min(5, steps // 3)
    first, last = (statistics.mean(record["loss"] for record in part) for part in (seen[:few], seen[-few:]))
    took = statistics.median(record["seconds"] for record in seen)
    kernel = start["full_attention"]
    print(f"FIGURE loss {first:.2f} to {last:.2f} in {len(seen)} steps of {took * 1e3:.0f} ms, attention by {kernel}")
    return int(start["kind"] != "start" or len(seen) != steps or not last < SHARE_LEFT * first)


if __name__ == "__main__":
    sys.exit(main())
