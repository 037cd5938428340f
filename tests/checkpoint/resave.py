"""Open a run's newest checkpoint on this topology and save it again, no step in between: one rank of it.

python -m tests.checkpoint.resave --config C.yaml --out CHECKPOINTS [--set a.b=value ...]
"""

import argparse
import sys
from pathlib import Path

from ds_dgemma.checkpoint.pretrained import open_pretrained
from ds_dgemma.checkpoint.run_directory import find_start
from ds_dgemma.checkpoint.save import save
from ds_dgemma.config.file import load_config
from ds_dgemma.engine.connect import connect
from ds_dgemma.engine.deepspeed_engine import start_engine
from ds_dgemma.engine.ds_config import deepspeed_config
from ds_dgemma.engine.optimizer_state import owned_shards
from ds_dgemma.objective.denoising import DenoisingObjective
from ds_dgemma.ranks.layout import RankLayout, disconnect
from ds_dgemma.run.open_model import fill_model
from ds_dgemma.run.prepare import prepare
from ds_dgemma.run.restore import restore

parser = argparse.ArgumentParser()
parser.add_argument("--config", type=Path)
parser.add_argument("--out", type=Path)
parser.add_argument("--set", action="append", default=[])
args = parser.parse_args()
config = load_config(args.config, args.set)
ranks = RankLayout.from_environment(config.parallel.expert_parallel_size)
connect(ranks, timeout_minutes=5)
settings = deepspeed_config(config, ranks.world, ranks.device.type)
pretrained = open_pretrained(config.model.path, config.model.revision)
prepared = prepare(config, settings, ranks, pretrained, find_start(config))
assert prepared.resumed is not None
stack = fill_model(prepared.model, ranks, prepared.deepspeed, config.train.precision, prepared.resumed)
engine = start_engine(
    DenoisingObjective(stack, config.objective.logits_chunk_mib), prepared.deepspeed, config.optimizer
)
restore(engine, ranks, prepared.resumed)
facts = {"adam_step": prepared.resumed.checkpoint.state["adam_step"], "model": config.model.path}
args.out.mkdir(parents=True, exist_ok=True)
save(args.out, prepared.start, owned_shards(engine, ranks), ranks.rank, facts)
disconnect()
sys.exit(0)
