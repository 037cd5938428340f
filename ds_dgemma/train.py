"""The recipe: fine-tune DiffusionGemma as a config says. Read this first.

    deepspeed [--num_gpus N | --hostfile H] --module ds_dgemma.train --config C.yaml [--set a.b=value ...]

The same command continues a run that was interrupted, from its newest complete checkpoint.
"""

import argparse
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import DiffusionGemmaConfig, PreTrainedTokenizerFast

from ds_dgemma.checkpoint.adapter import AdapterReader
from ds_dgemma.checkpoint.names import DECODER, checkpoint_name
from ds_dgemma.checkpoint.run_state import StateReader, check_same_model, prune, save
from ds_dgemma.checkpoint.weights import local_directory, model_digest
from ds_dgemma.config import RunConfig
from ds_dgemma.config_file import load_config
from ds_dgemma.data.batch import Batch, Example
from ds_dgemma.data.sources import load_conversations
from ds_dgemma.data.stream import ExampleSet, Stream, prepare_examples
from ds_dgemma.data.tokenizer import image_tokens, load_tokenizer
from ds_dgemma.engine.deepspeed_engine import (
    count_steps_done,
    gradient_norm,
    set_learning_rate,
    start_engine,
)
from ds_dgemma.engine.ds_config import build_cpu_adam, deepspeed_config
from ds_dgemma.engine.hostfile import check_expert_groups
from ds_dgemma.engine.launcher_watch import watch_launcher
from ds_dgemma.engine.open_model import OutlinedModel, fill_model, outline_model
from ds_dgemma.engine.optimizer_state import KINDS, adam_step, create_moments, owned_shards
from ds_dgemma.engine.ranks import RankLayout, agreed, connect, disconnect, gather, sum_over_ranks
from ds_dgemma.engine.router_balance import router_balance
from ds_dgemma.engine.schedule import learning_rate
from ds_dgemma.engine.trainable import check_groups, check_router_balance, check_stage
from ds_dgemma.errors import EXIT_USER_ERROR, UserError
from ds_dgemma.evaluation.validation import validate
from ds_dgemma.model.lora import seed_dropout
from ds_dgemma.model.spec import read_spec, text_spec
from ds_dgemma.objective.denoising import DenoisingObjective, TokenWeights
from ds_dgemma.objective.noise import Corruption
from ds_dgemma.run_directory import (
    CHECKPOINTS,
    METRICS,
    check_same_data,
    claim,
    find_start,
    mark_complete,
    owner,
    write_settings,
)
from ds_dgemma.tracking.metrics import StepMetrics, memory_gib
from ds_dgemma.tracking.sinks import ConsoleSink, JsonlSink, Sink, Tracker, WandbSink

DOWNLOAD_HOURS = 24


@dataclass(frozen=True)
class Prepared:
    """All that was checked and read before the first weight."""

    deepspeed: dict[str, Any]
    model: OutlinedModel
    collate: Callable[[list[tuple[Example, int]]], Batch]
    examples: ExampleSet
    held_out: list[Example]  # empty when nothing is validated
    resumed: StateReader | None
    facts: dict[str, Any]  # of the model and the data, kept in every checkpoint

    @property
    def start(self) -> int:
        """Steps that are done."""
        return self.resumed.checkpoint.step if self.resumed else 0


def prepare(config: RunConfig, ranks: RankLayout) -> Prepared:
    """Check everything that a user can get wrong; no collective, no weights, no download of the model.

    Raises:
        UserError: what is wrong, and what to do about it.
    """
    settings = deepspeed_config(config, ranks.world, "cuda" if ranks.device.type == "cuda" else "cpu")
    check_expert_groups(config.parallel, {socket.gethostname(): ranks.local_world})
    resumed, warnings = find_start(config)
    if config.optimizer.warmup_steps >= config.train.max_steps:
        warnings.append("optimizer.warmup_steps is not below train.max_steps: the run ends before lr is reached.")
    directory = local_directory(config.model.path, config.model.revision, download=False)
    spec = read_spec(str(directory))
    text = text_spec(spec)
    tokenizer = load_tokenizer(directory, text.vocab_size)
    grouped = config.parallel.grouped_matmul
    model = outline_model(
        spec,
        directory,
        ranks,
        grouped_matmul=ranks.device.type == "cuda" if grouped == "auto" else grouped == "on",
        train_router=config.model.train_router,
        activation_checkpointing=config.train.activation_checkpointing,
        copy_decoder_scalars=config.model.missing_encoder_scalars == "copy_decoder",
        frozen=config.model.freeze,
        lora=config.lora.model_copy(update={"path": None}) if config.lora and resumed else config.lora,
    )
    weights = model_digest(directory)
    if resumed:
        check_same_model(config.model.path, weights, resumed)
    check_stage(settings["zero_optimization"]["stage"], model.trained_names())
    check_groups(config.optimizer, model.trained_names(), model.reader.files)
    check_router_balance(config.objective.router_balance_weight, model.trained_names())
    if model.adapters and (warning := model.adapters.base_warning(config.model.path)):
        warnings.append(warning)

    examples, held_out = read_data(config, spec, tokenizer, ranks)
    corruption = Corruption(
        seed=config.seed,
        vocab_size=text.vocab_size,
        noise_eps=config.objective.noise_eps,
        self_conditioning_probability=config.objective.self_conditioning_probability,
        canvases_per_example=config.objective.canvases_per_example,
        first_pass_bucket=config.objective.first_pass_bucket,
        pad_id=text.pad_token_id or 0,
    )
    build_cpu_adam(settings)
    if ranks.is_main:
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
    facts = {
        "model": config.model.path,
        "model_digest": weights,
        "data_digest": examples.digest,
        "examples": len(examples),
    }
    if resumed:
        check_same_data(config.data.train, resumed, examples.digest, len(examples))
    reader = StateReader(resumed) if resumed else None
    return Prepared(settings, model, corruption.collate, examples, held_out, reader, facts)


def read_data(
    config: RunConfig, spec: DiffusionGemmaConfig, tokenizer: PreTrainedTokenizerFast, ranks: RankLayout
) -> tuple[ExampleSet, list[Example]]:
    """The examples to train on and those to validate on, checked and tokenized; rank 0 tells how many were kept."""
    canvas_length, eos_id = spec.canvas_length, tokenizer.eos_token_id
    assert isinstance(canvas_length, int)
    assert isinstance(eos_id, int)
    images = image_tokens(tokenizer, (spec.image_token_id, spec.boi_token_id, spec.eoi_token_id))

    def read(split: Literal["train", "validation"]) -> ExampleSet:
        conversations = load_conversations(config.data, split, images)
        examples = prepare_examples(conversations, tokenizer, config.data, canvas_length, eos_id)
        if ranks.is_main:
            print(f"{split}: {examples.report}", flush=True)
        return examples

    examples = read("train")
    if not config.validation.every:
        return examples, []
    held_out = read("validation")
    return examples, [held_out[i] for i in range(min(len(held_out), config.validation.examples))]


def train(config: RunConfig, ranks: RankLayout, prepared: Prepared, tracker: Tracker) -> None:
    """Train from the prepared start to `train.max_steps`; a collective."""
    stack = fill_model(prepared.model, ranks, prepared.deepspeed, config.train.precision, prepared.resumed, config.seed)
    objective = DenoisingObjective(stack, config.objective.logits_chunk_mib).train()
    engine = start_engine(objective, prepared.deepspeed, config.optimizer)
    create_moments(engine, 0)  # before the first step, or a checkpoint after skipped ones would find none
    if prepared.resumed:
        restore(engine, ranks, prepared.resumed)
        count_steps_done(engine, prepared.start)
    elif prepared.model.adapters and prepared.model.adapters.continued:
        continue_adapter(engine, ranks, prepared.model.adapters.continued)
    stream = Stream(
        examples=prepared.examples,
        collate=prepared.collate,
        seed=config.seed,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        rank=ranks.rank,
        world_size=ranks.world,
        workers=config.data.workers,
        start_step=prepared.start,
    )
    checkpoints, last = config.run.dir / CHECKPOINTS, config.train.max_steps
    batches = iter(stream)
    for step in range(prepared.start + 1, last + 1):
        tracker.track(update(engine, batches, step, config, ranks))
        if prepared.held_out and due(step, config.validation.every):
            losses = validate(
                engine,
                prepared.held_out,
                prepared.collate,
                config.train.micro_batch_size,
                ranks,
                config.objective.encoder_loss_weight,
            )
            tracker.track({"kind": "validation", "step": step, **losses})
        if due(step, config.checkpoint.every) or step == last:
            facts = {**prepared.facts, "adam_step": adam_step(engine)}
            save(checkpoints, step, owned_shards(engine, ranks), KINDS, ranks.rank, facts)
            if ranks.is_main:
                prune(checkpoints, config.checkpoint.keep_last)


def update(engine: Any, batches: Iterator[list[Batch]], step: int, config: RunConfig, ranks: RankLayout) -> StepMetrics:
    """One optimizer step: count, then forward and backward for every micro-batch."""
    began = time.perf_counter()
    micro_batches = next(batches)
    # The tokens of the whole global batch, before any forward: a token counts the same on every rank.
    counts = [(batch.tokens(), *batch.counts()) for batch in micro_batches]
    totals = [float(sum(column)) for column in zip(*counts, strict=True)]
    tokens, diffusion_tokens, ar_tokens = sum_over_ranks(totals, ranks.device)
    ar_weight = config.objective.encoder_loss_weight
    shares = ranks.world * len(micro_batches)
    weights = TokenWeights.global_mean(int(diffusion_tokens), int(ar_tokens), ar_weight, shares)
    lr = learning_rate(step - 1, config.train.max_steps, config.optimizer)
    set_learning_rate(engine, lr)

    balance = router_balance(engine, micro_batches, ranks, config.objective.router_balance_weight)
    sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)
    seed_dropout(config.seed, step, ranks.rank)
    for batch in micro_batches:
        parts = engine(batch.to(ranks.device), weights, balance)
        engine.backward(parts.loss)
        engine.step()  # after every micro-batch: DeepSpeed counts the boundary itself
        sums += torch.stack([parts.diffusion_nll, parts.ar_nll, parts.router])

    diffusion_nll, ar_nll, router = sum_over_ranks(sums.tolist(), ranks.device)
    diffusion, ar = diffusion_nll / max(diffusion_tokens, 1), ar_nll / max(ar_tokens, 1)
    seconds = time.perf_counter() - began
    return StepMetrics(
        step=step,
        loss=diffusion + ar_weight * ar + config.objective.router_balance_weight * router,
        loss_diffusion=diffusion,
        loss_ar=ar,
        loss_router=router if balance else None,
        grad_norm=gradient_norm(engine),
        lr=lr,
        samples=step * config.train.global_batch_size,
        tokens=int(tokens),
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        memory_gib=memory_gib(ranks.device),
    )


def restore(engine: Any, ranks: RankLayout, trained: StateReader) -> None:
    """Put fp32 weights and moments back, whatever topology they were written by."""
    create_moments(engine, trained.checkpoint.state["adam_step"])
    for shard in owned_shards(engine, ranks):
        for kind in KINDS:
            shard.set(kind, trained.read(shard.name, kind, shard.start, shard.stop).to(ranks.device))


def continue_adapter(engine: Any, ranks: RankLayout, adapter: AdapterReader) -> None:
    """Give the fp32 weights the adapter's own numbers: in a bf16 run they were made from bf16."""
    for shard in owned_shards(engine, ranks):
        factor = checkpoint_name(shard.name).removeprefix(DECODER)
        shard.set("fp32", adapter.values(factor, shard.start, shard.stop).to(ranks.device, torch.float32))


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


def open_tracker(config: RunConfig, ranks: RankLayout, start: int) -> Tracker:
    """Rank 0's sinks; the metrics file is cut back to the step that the run continues from."""
    if not ranks.is_main:
        return Tracker([])
    sinks: list[Sink] = [
        JsonlSink(config.run.dir / METRICS, keep_through_step=start),
        ConsoleSink(config.train.max_steps, start, config.tracking.console_every),
    ]
    if config.tracking.wandb.mode != "disabled":
        sinks.append(WandbSink(config.tracking.wandb, config.run.dir, config.model_dump(mode="json")))
    return Tracker(sinks)


def main(argv: list[str] | None = None) -> int:
    """Parse, check, train; 0 when the run is complete, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="ds_dgemma.train", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="the run's YAML")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", help="override a setting")
    # the launcher passes it; the environment says the same
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        config = load_config(args.config, args.set)
    except UserError as error:
        # All ranks of a host read the same file: one of them tells.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(error, file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    ranks = RankLayout.from_environment(config.parallel.expert_parallel_size)
    watch_launcher()
    connect(ranks, config.parallel.collective_timeout_minutes)
    with agreed(ranks, hours=DOWNLOAD_HOURS):
        if ranks.local_rank == 0:  # the node's other ranks find it in the cache
            local_directory(config.model.path, config.model.revision)
    with agreed(ranks):
        lock = claim(config.run.dir) if ranks.is_main else nullcontext()
    with agreed(ranks):
        prepared = prepare(config, ranks)
    seen = gather((owner(config.run.dir), prepared.start), ranks)
    with agreed(ranks):
        if len(set(seen)) > 1:
            raise UserError(
                f"run.dir: {config.run.dir} is not the same directory for all ranks: put it on a disk that they share."
            )
        if ranks.is_main:
            write_settings(config, prepared.deepspeed)
        tracker = open_tracker(config, ranks, prepared.start)
    if ranks.is_main and prepared.start >= config.train.max_steps:
        print(f"{config.run.dir} is complete at step {prepared.start}: nothing is left to train", flush=True)
    with lock, tracker:
        try:
            train(config, ranks, prepared, tracker)
            if ranks.is_main:
                mark_complete(config.run.dir, max(prepared.start, config.train.max_steps))
        except UserError as error:  # the disk is full, say; of all ranks at once, or the launcher ends the others
            if ranks.is_main:
                print(error, file=sys.stderr, flush=True)
            return EXIT_USER_ERROR
    disconnect()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # All is closed. Threads of gloo and of DeepSpeed's libraries may not be, and their destructors can abort a
    # finished run.
    os._exit(code)
