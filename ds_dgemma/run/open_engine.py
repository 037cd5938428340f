"""The engine of a run, with the numbers that it goes on from."""

from typing import Any

from ds_dgemma.config.run import RunConfig
from ds_dgemma.engine.deepspeed_engine import start_engine
from ds_dgemma.engine.optimizer_state import create_moments
from ds_dgemma.engine.private import count_steps_done
from ds_dgemma.objective.denoising import DenoisingObjective
from ds_dgemma.ranks.layout import RankLayout
from ds_dgemma.run.open_model import fill_model
from ds_dgemma.run.prepare import Prepared
from ds_dgemma.run.restore import continue_adapter, restore


def open_engine(config: RunConfig, ranks: RankLayout, prepared: Prepared) -> Any:
    """Load the weights, wrap the objective, restore weights and moments of the checkpoint; a collective."""
    stack = fill_model(prepared.model, ranks, prepared.deepspeed, config.train.precision, prepared.resumed, config.seed)
    objective = DenoisingObjective(stack, config.objective.logits_chunk_mib, config.objective.loss).train()
    engine = start_engine(objective, prepared.deepspeed, config.optimizer)
    create_moments(engine, 0)  # before the first step, or a checkpoint after skipped ones would find none
    if prepared.resumed:
        restore(engine, ranks, prepared.resumed)
        prepared.resumed.close()
        count_steps_done(engine, prepared.start)
    elif prepared.model.adapters and prepared.model.adapters.continued:
        continue_adapter(engine, ranks, prepared.model.adapters.continued)
    return engine
