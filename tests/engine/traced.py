"""Train as `ds_dgemma.train` does, and print what no file of a run tells: whether frozen weights stayed as they were,
how often ZeRO-3 gathered a layer's parameters in a micro-step of the last step, and how many layers were whole at once.

    python -m tests.engine.traced [--no-leaves] [--stop-after STEP] --config C.yaml ...

--no-leaves lets ZeRO-3 gather linear by linear instead of layer by layer; --stop-after stops the run as a signal would.
"""

import argparse
import sys
from collections import Counter
from itertools import chain
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from ds_dgemma import train
from ds_dgemma.engine import deepspeed_engine
from ds_dgemma.ranks.stop_request import StopRequest
from ds_dgemma.run import open_engine

GATHER = "_PartitionedParameterCoordinator__all_gather_params_"  # all that ZeRO-3 gathers for a module comes by here


def shard(parameter: Any) -> torch.Tensor:
    """What this rank holds of a parameter."""
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter


class Gathers:
    """Counts every layer's parameters as they are gathered, and forgets them when the next step begins."""

    def __init__(self) -> None:
        self._by_parameter: Counter[int] = Counter()
        self._layers: dict[int, list[Any]] = {}
        self._micro_batches = 1
        self.at_once = 0  # layers
        gather, update = getattr(PartitionedParameterCoordinator, GATHER), train.update

        def counted(coordinator: Any, parameters: Any, *rest: Any, **options: Any) -> Any:
            missing = [p.ds_id for p in parameters if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
            self._by_parameter.update(missing)
            gather(coordinator, parameters, *rest, **options)
            whole = [any(p.ds_status != ZeroParamStatus.NOT_AVAILABLE for p in own) for own in self._layers.values()]
            self.at_once = max(self.at_once, sum(whole))

        def stepped(engine: Any, *rest: Any) -> Any:
            layers = enumerate(engine.module.model.layers)
            self._layers = {n: [p for p in layer.parameters() if hasattr(p, "ds_id")] for n, layer in layers}
            self._by_parameter.clear()
            done = update(engine, *rest)
            self._micro_batches = len(done.micro_batches)
            return done

        setattr(PartitionedParameterCoordinator, GATHER, counted)
        train.update = stepped

    def of_a_layer(self) -> list[float]:
        """The different counts that a layer's parameters have, smallest first."""
        return sorted({self._by_parameter[p.ds_id] / self._micro_batches for p in chain(*self._layers.values())})


def main(argv: list[str]) -> int:
    """Train; print two lines for every rank."""
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
    start, gathers = open_engine.start_engine, Gathers()

    def traced(objective, *arguments):
        for name, parameter in objective.named_parameters():
            if not parameter.requires_grad:
                frozen[name] = parameter, shard(parameter).detach().clone()
        return start(objective, *arguments)

    open_engine.start_engine = traced
    code = train.main(argv)
    changed = [name for name, (parameter, before) in frozen.items() if not torch.equal(shard(parameter), before)]
    dtypes = sorted({str(before.dtype) for _, before in frozen.values()})
    counts = ", ".join(f"{count:g}" for count in gathers.of_a_layer())
    print(
        f"{len(changed)} changed of {len(frozen)} frozen, dtypes {dtypes}\n"
        f"gathers of a layer's parameter in a micro-step: [{counts}], layers whole at once: {gathers.at_once}\n",
        end="",  # one write: without Python's buffer a newline of its own lets another rank's line in between
        flush=True,
    )
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
