"""What a run measures at every optimizer step, and how one record becomes one line of `metrics.jsonl`.

A record is a flat mapping with a "step" (int). One without "kind" holds the fields of `StepMetrics`; any
other kind (start, validation, ...) names itself in "kind". A line is strict JSON, and a finite float is written in
the shortest form that reads back to the same 64 bits. JSON has no NaN or infinity: such a value is null on
the line, which readers take for a gap, and its spelling is kept beside it, `"not_finite": {"loss": "nan"}`.
"""

import json
import math
import re
import resource
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ds_dgemma.errors import UserError

Record = Mapping[str, Any]
START = "start"  # the kind of the first record: what a run computes with

GIB = 2**30


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, already reduced over all ranks where that means anything."""

    step: int  # optimizer steps done, this one included: the first is 1
    loss: float  # loss_diffusion + encoder_loss_weight * loss_ar (+ router_balance_weight * loss_router): minimised
    loss_diffusion: float  # nats per supervised canvas token of the global batch
    loss_ar: float  # nats per scored next token of the global batch
    grad_norm: float  # global L2 norm before clipping
    lr: float  # learning rate that this step used
    samples: int  # examples since the start of the run, all ranks: grows from step to step
    tokens: int  # clean and canvas tokens that this step read, all ranks, padding left out
    seconds: float  # wall time of this step, loading included; validation and checkpoints left out
    tokens_per_second: float  # tokens / seconds
    memory_gib: float  # `memory_gib` of rank 0
    mfu: float | None = None  # useful FLOPs of the tokens read / (seconds * devices * peak); None: peak not known
    loss_router: float | None = None  # load-balance loss of the routers, top-k when all is even; None: not trained on

    def record(self) -> dict[str, Any]:
        """As it is written: `mfu` always, None as null; `loss_router` where it is on."""
        return {name: value for name, value in asdict(self).items() if value is not None or name == "mfu"}


# Of dense bf16 products, TFLOP/s, by a part of the card's name; the first that fits
PEAK_TFLOPS = {
    "GB200": 2500, "B200": 2250, "GH200": 989, "H200 NVL": 835, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835,
    "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "MI300X": 1307,
}  # fmt: skip
# A part of a card, and cards that share a larger one's name
OTHERS = re.compile(r"\b(MIG|Laptop|D)\b")


def peak_flops(name: str | None, said_tflops: float | None) -> float | None:
    """FLOP/s that a CUDA card of this name (None: the CPU) reaches at most, or what was said of it; None: unknown."""
    if said_tflops is not None:
        return said_tflops * 1e12
    if name is None or OTHERS.search(name):
        return None
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process since its start, GiB: allocated by torch on a GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB  # macOS counts bytes, Linux KiB


def to_line(record: Record) -> str:
    """Write a record as one line of JSON, newline included."""
    odd = {key: str(value) for key, value in record.items() if not _finite(value)}
    shown = {**record, **dict.fromkeys(odd), "not_finite": odd} if odd else dict(record)
    return json.dumps(shown, allow_nan=False) + "\n"


def read_lines(path: Path) -> Iterator[tuple[str, Record]]:
    """Yield every line of a metrics file with its record, without the torn last line of a killed writer."""
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        lines = file.readlines()
    for number, line in enumerate(lines, start=1):
        record = _from_line(line)
        if record is not None:
            yield line if line.endswith("\n") else line + "\n", record
        elif number < len(lines):
            found = repr(line.strip()[:60])
            raise UserError(f"{path}:{number}: expected a JSON object with a step, found {found}. Delete that line.")


def last_step(path: Path) -> int:
    """The last step that a metrics file tells of; 0 where there is no file."""
    return max((int(record["step"]) for _, record in read_lines(path)), default=0) if path.is_file() else 0


def _finite(value: int | float | str) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _from_line(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    for key, value in record.pop("not_finite", {}).items():
        record[key] = float(value)
    return record
