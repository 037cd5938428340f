"""What settings of different sections say against each other: faults, a setting and what is wrong with it; doubts."""

from collections.abc import Iterator
from math import lcm
from pathlib import Path

from ds_dgemma.config.division import divisors, either
from ds_dgemma.config.run import RunConfig

Fault = tuple[str, str]


def faults(config: RunConfig) -> Iterator[Fault]:
    """All of them; nothing is loaded."""
    batch, model = config.train.global_batch_size, Path(config.model.path)
    if batch % config.train.micro_batch_size:
        advice = f"does not divide train.global_batch_size {batch}. Set {either(divisors(batch))}."
        yield "train.micro_batch_size", advice
    if config.lora is not None:
        yield from _faults_of_lora(config)
    elif config.objective.router_balance_weight and not config.model.train_router:
        yield "objective.router_balance_weight", "trains frozen routers. Set model.train_router: true, or 0."
    if config.optimizer.type == "muon" and config.train.gradient_clipping:
        yield (
            "train.gradient_clipping",
            "would clip Muon's updates, whose norm is that of orthogonal matrices, and not gradients. Set 0.",
        )
    for name in ("validation", "evaluation"):
        if getattr(config, name).every and config.data.validation is None:
            yield f"{name}.every", f"needs held-out data. Set data.validation, or {name}.every: 0."
    yield from _faults_of_best(config)
    if model.is_dir() and config.run.dir.resolve().is_relative_to(model.resolve()):
        yield "run.dir", f"is in the model's own directory, {model}. Choose another place."
    if not config.deepspeed.is_file():
        yield "deepspeed", f"no such file; relative paths start at the current directory, {Path.cwd()}."


def doubts(config: RunConfig, positions: int) -> Iterator[str]:
    """What may be meant, and is worth a word; `positions`: the model's `max_position_embeddings`."""
    if config.data.max_length > positions:
        yield (
            f"data.max_length {config.data.max_length:,} is above the model's max_position_embeddings, {positions:,}: "
            "it was made for no positions behind that."
        )
    if config.optimizer.warmup_steps >= config.train.max_steps:
        yield "optimizer.warmup_steps is not below train.max_steps: the run ends before lr is reached."
    measured, saved = getattr(config, config.checkpoint.best_by.split("/")[0]).every, config.checkpoint.every
    if (config.checkpoint.keep_best or config.train.early_stopping_patience) and saved != measured:
        yield (
            f"{config.checkpoint.best_by} is measured every {measured} steps, checkpoints are every {saved} (0: at the "
            "end). The best may have none: set checkpoint.every equal to keep it."
        )


def _faults_of_lora(config: RunConfig) -> Iterator[Fault]:
    if config.model.train_router:
        yield (
            "model.train_router",
            "with lora the base is frozen. Remove it, or adapt the routers: add router.proj to lora.target_modules.",
        )
    if config.model.train_vision_embedding:
        yield "model.train_vision_embedding", "with lora the base is frozen. Remove one of them."
    if config.model.freeze:
        yield (
            "model.freeze",
            "with lora every weight of the base is frozen already. Remove it; lora.exclude_modules says which linears "
            "get no adapter.",
        )
    if config.optimizer.type == "muon":
        yield "optimizer.type", "is for whole matrices, not for the factors of lora. Use adamw."


def _faults_of_best(config: RunConfig) -> Iterator[Fault]:
    """Why nothing could be the best: the setting that asks for it, and what it lacks."""
    kind, name = config.checkpoint.best_by.split("/")
    measured, saved, last = getattr(config, kind).every, config.checkpoint.every, config.train.max_steps
    levels = [
        f"{one}_at_{level:g}" for one in ("loss_diffusion", "accuracy") for level in config.validation.noise_levels
    ]
    known = ["loss", "loss_diffusion", "loss_ar", "accuracy", *levels]
    if kind == "validation" and name not in known:
        yield "checkpoint.best_by", f"is nothing that validation measures. It measures {', '.join(known)}."
    elif config.train.early_stopping_patience and not measured:
        yield "train.early_stopping_patience", f"waits for {config.checkpoint.best_by}. Set {kind}.every."
    elif config.checkpoint.keep_best and not measured:
        yield "checkpoint.keep_best", f"is by {config.checkpoint.best_by}. Set {kind}.every, or 0 here."
    elif config.checkpoint.keep_best and (not saved or lcm(saved, measured) > last):
        yield (
            "checkpoint.keep_best",
            f"no step up to {last} has both a checkpoint (every {saved}) and {kind} (every {measured}), by which the "
            f"best is known. Set checkpoint.every to a multiple of {kind}.every, or 0 here.",
        )
