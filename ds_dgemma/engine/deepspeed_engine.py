"""From an objective and a config to a DeepSpeed engine, and one optimizer step of it."""

from typing import Any

import deepspeed
import torch
from deepspeed.utils.z3_leaf_module import set_z3_leaf_module

from ds_dgemma.config.optimizer import OptimizerSection
from ds_dgemma.engine import private
from ds_dgemma.engine.optimizers import choose_optimizer
from ds_dgemma.model.stack import DiffusionGemmaStack
from ds_dgemma.objective.denoising import DenoisingObjective


def start_engine(
    objective: DenoisingObjective, deepspeed_config: dict[str, Any], optimizer: OptimizerSection | None = None
) -> deepspeed.DeepSpeedEngine:
    """Wrap the objective; its trainable parameters get fp32 master weights and the optimizer that `optimizer` names,
    AdamW without, in its groups.
    """
    gather_as_units(objective.model)
    buffers = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    chosen = choose_optimizer(objective, deepspeed_config, optimizer)
    engine, *_ = deepspeed.initialize(
        model=objective,
        optimizer=chosen.make,
        model_parameters=chosen.groups,
        config=chosen.deepspeed_config,
        dist_init_required=False,
    )
    chosen.after(engine)
    # Below ZeRO-3 DeepSpeed casts buffers with the model; rotary frequencies in bf16 would blur long positions.
    for name, buffer in objective.named_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(objective.get_submodule(owner), leaf, buffers[name].to(buffer.device))
    return engine


def gather_as_units(stack: DiffusionGemmaStack) -> None:
    """Let ZeRO-3 gather a whole layer at once: one coalesced collective where there would be one per linear.

    Not the vocabulary: it is one matrix anyway, and after each of its uses DeepSpeed would reduce a gradient of zeros.
    """
    for module in (*stack.sweep_layers(), stack.self_conditioning):
        set_z3_leaf_module(module, True)


def set_learning_rate(engine: Any, lr: float) -> None:
    """Set the next update's learning rate on every parameter group, in proportion to its own."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def gradient_norm(engine: deepspeed.DeepSpeedEngine) -> float:
    """The global norm before clipping, of the update just made."""
    norm = engine.get_global_grad_norm()
    return float(norm.item() if isinstance(norm, torch.Tensor) else norm or 0.0)


def was_skipped(engine: Any) -> bool:
    """Whether DeepSpeed left the update out, its gradient's norm being NaN or infinite: the same on every rank. What
    was accumulated is gone then.
    """
    skipped = not engine.was_step_applied()
    if skipped:
        private.forget_gradients(engine)
    return skipped
