"""Train as `ds_dgemma.train` does, and print what no file of a run tells: whether frozen weights stayed as they were.

    python -m tests.engine.traced [--no-leaves] [--stop-after STEP] --config C.yaml ...

--no-leaves lets ZeRO-3 gather linear by linear instead of layer by layer; --stop-after stops the run as a signal would.
"""

import argparse
import sys
from typing import Any

import torch

from ds_dgemma import train
from ds_dgemma.engine import deepspeed_engine
from ds_dgemma.engine.stop_request import StopRequest


def shard(parameter: Any) -> torch.Tensor:
    """What this rank holds of a parameter."""
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter


def main(argv: list[str]) -> int:
    """Train; print a line for every rank."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--no-leaves", action="store_true")
    parser.add_argument("--stop-after", type=int)
    ours, argv = parser.parse_known_args(argv)
    if ours.no_leaves:
        deepspeed_engine.gather_as_units = lambda stack: None
    agreed = StopRequest.agreed

    def agreed_after(stop, ranks):
        if stop.step == ours.stop_after:
            stop.wish("the end of a test's leg")
        return agreed(stop, ranks)

    StopRequest.agreed = agreed_after
    frozen: dict[str, tuple[Any, torch.Tensor]] = {}
    start = train.start_engine

    def traced(objective, *arguments):
        for name, parameter in objective.named_parameters():
            if not parameter.requires_grad:
                frozen[name] = parameter, shard(parameter).detach().clone()
        return start(objective, *arguments)

    train.start_engine = traced
    code = train.main(argv)
    changed = [name for name, (parameter, before) in frozen.items() if not torch.equal(shard(parameter), before)]
    print(
        f"{len(changed)} changed of {len(frozen)} frozen, dtypes {sorted({str(b.dtype) for _, b in frozen.values()})}"
    )
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
