"""Give a new engine the numbers that it goes on from."""

from typing import Any

import torch

from ds_dgemma.checkpoint.adapter import AdapterReader
from ds_dgemma.checkpoint.run_state import StateReader
from ds_dgemma.engine.optimizer_state import create_moments, owned_shards
from ds_dgemma.model.names import DECODER, checkpoint_name
from ds_dgemma.ranks.layout import RankLayout


def restore(engine: Any, ranks: RankLayout, trained: StateReader) -> None:
    """Put fp32 weights and moments back, whatever topology they were written by."""
    create_moments(engine, trained.checkpoint.state["adam_step"])
    for shard in owned_shards(engine, ranks):
        for kind in shard.kinds:
            shard.set(kind, trained.read(shard.name, kind, shard.start, shard.stop).to(ranks.device))


def continue_adapter(engine: Any, ranks: RankLayout, adapter: AdapterReader) -> None:
    """Give the fp32 weights the adapter's own numbers: in a bf16 run they were made from bf16."""
    for shard in owned_shards(engine, ranks):
        factor = checkpoint_name(shard.name).removeprefix(DECODER)
        shard.set("fp32", adapter.values(factor, shard.start, shard.stop).to(ranks.device, torch.float32))
