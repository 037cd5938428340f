"""Export a run whose model has real widths and say what it took: memory and seconds by number of workers.

    python tests/benchmarks/export.py [--check] [--dir DIR] [--experts 16] [--vocab 32768] [--shard-gb 0.4]

The model (`real_checkpoint.py`) and a run that trained all of it (`tests/reference/trained_run.py`) are made in DIR if
they are not there. Memory is anonymous memory (RssAnon, sampled by a thread) above what the process had before. With
--check the exit code is 1 when it is over workers * (1.1 * largest shard + 0.2 GiB). Dated results: README.md here.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from ds_dgemma.checkpoint.export import export_run
from ds_dgemma.checkpoint.hf_weights import Layout
from tests.benchmarks.anonymous import PeakAnonymous, anonymous_bytes
from tests.benchmarks.real_checkpoint import make_checkpoint
from tests.gpu import shapes
from tests.reference.trained_run import write_run

GIB = 2**30


def export(run: Path, out: Path, shard_gb: float, workers: int) -> tuple[int, float]:
    """Bytes of memory and seconds of one export; in a process of its own."""
    base, began = anonymous_bytes(), time.perf_counter()
    with PeakAnonymous() as memory:
        export_run(run, out, layout=Layout(shard_bytes=int(shard_gb * 1e9), workers=workers))
    return memory.peak - base, time.perf_counter() - began


def main() -> int:
    """Make what is missing, export with every number of workers, compare with the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 when the bound is broken")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "ds_dgemma_export")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--shard-gb", type=float, default=0.4)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    model, run, out = args.dir / "model", args.dir / "run", args.dir / "out"
    make_checkpoint(shapes.config(False, 2, num_experts=args.experts, vocab_size=args.vocab), model)
    if not run.exists():
        write_run(run, model, "bf16")
    print("| workers | model, GiB | largest shard, GiB | memory, GiB | seconds |\n|---|---|---|---|---|")
    broken = False
    for workers in args.workers:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            memory, seconds = pool.apply(export, (run, out, args.shard_gb, workers))
        sizes = [file.stat().st_size for file in out.glob("*.safetensors")]
        print(
            f"| {workers} | {sum(sizes) / GIB:.2f} | {max(sizes) / GIB:.2f} | {memory / GIB:.2f} | {seconds:.1f} |",
            flush=True,
        )
        broken |= memory > workers * (1.1 * max(sizes) + 0.2 * GIB)
    print("the bound is broken" if broken else "the bound holds")
    return 1 if broken and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
