"""Everything that is checked and read before the first weight."""

import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ds_dgemma.checkpoint.retention import Scores
from ds_dgemma.checkpoint.run_state import StateReader, check_same_model
from ds_dgemma.checkpoint.weights import local_directory, model_digest
from ds_dgemma.config import RunConfig
from ds_dgemma.data.batch import Batch, Example
from ds_dgemma.data.read import read_split
from ds_dgemma.data.stream import ExampleSet
from ds_dgemma.data.tokenizer import load_tokenizer
from ds_dgemma.engine.ds_config import build_cpu_adam, deepspeed_config
from ds_dgemma.engine.hostfile import check_expert_groups
from ds_dgemma.engine.open_model import OutlinedModel, choose_kernels, outline_run
from ds_dgemma.engine.ranks import RankLayout
from ds_dgemma.engine.trainable import check_groups, check_router_balance, check_stage
from ds_dgemma.model.spec import read_spec, text_spec
from ds_dgemma.objective.collate import collate
from ds_dgemma.objective.corruption import Corruption
from ds_dgemma.run_directory import Start, check_same_data


@dataclass(frozen=True)
class Prepared:
    """All that was checked and read before the first weight."""

    deepspeed: dict[str, Any]
    model: OutlinedModel
    attention: dict[str, str]  # the kernel of each layer type
    collate: Callable[[list[tuple[Example, int]]], Batch]
    examples: ExampleSet
    held_out: list[Example]  # empty when nothing is validated
    scores: Scores  # of the held-out examples
    resumed: StateReader | None
    facts: dict[str, Any]  # of the model and the data, kept in every checkpoint

    @property
    def start(self) -> int:
        """Steps that are done."""
        return self.resumed.checkpoint.step if self.resumed else 0


def prepare(config: RunConfig, ranks: RankLayout, start: Start) -> Prepared:
    """Check everything else that a user can get wrong; no collective, no weights, no download of the model.

    Raises:
        UserError: what is wrong, and what to do about it.
    """
    settings = deepspeed_config(config, ranks.world, "cuda" if ranks.device.type == "cuda" else "cpu")
    check_expert_groups(config.parallel, {socket.gethostname(): ranks.local_world})
    resumed, warnings = start.resumed, list(start.warnings)
    if config.optimizer.warmup_steps >= config.train.max_steps:
        warnings.append("optimizer.warmup_steps is not below train.max_steps: the run ends before lr is reached.")
    directory = local_directory(config.model.path, config.model.revision, download=False)
    spec = read_spec(str(directory))
    text = text_spec(spec)
    tokenizer = load_tokenizer(directory, text.vocab_size)
    model = outline_run(config, spec, directory, ranks, resumed is not None)
    attention, dropped = choose_kernels(config, spec, ranks.device)
    warnings += dropped
    weights = model_digest(directory)
    if resumed:
        check_same_model(config.model.path, weights, resumed.checkpoint)
        resumed.check_fits(model.trained_sizes(ranks))
    check_stage(settings["zero_optimization"]["stage"], model.trained_names())
    check_groups(config.optimizer, model.trained_names(), model.reader.files)
    check_router_balance(config.objective.router_balance_weight, model.trained_names())
    if model.adapters and (warning := model.adapters.base_warning(config.model.path)):
        warnings.append(warning)

    _, examples = read_split(config.data, "train", spec, tokenizer)
    reports, held_out, measured_on = [f"train: {examples.report}"], [], None
    if config.validation.every:
        _, validation = read_split(config.data, "validation", spec, tokenizer)
        reports.append(f"validation: {validation.report}")
        held_out = [validation[i] for i in range(min(len(validation), config.validation.examples))]
        measured_on = f"{validation.digest} {len(held_out)}"
    corruption = Corruption(config.objective, config.seed, text.vocab_size, text.pad_token_id or 0)
    build_cpu_adam(settings)
    if ranks.is_main:
        print("\n".join(reports), flush=True)
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        if resumed:
            print(f"continuing from {resumed.checkpoint.path}", flush=True)
    facts = {
        "model": config.model.path,
        "model_digest": weights,
        "data_digest": examples.digest,
        "examples": len(examples),
    }
    if resumed:
        check_same_data(config.data.train, resumed.checkpoint, examples.digest, len(examples))
    scores = Scores.continued(measured_on, resumed.checkpoint if resumed else None)
    make_batch = partial(collate, corruption)
    return Prepared(settings, model, attention, make_batch, examples, held_out, scores, resumed, facts)
