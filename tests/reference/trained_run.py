"""A run directory as training leaves it, made from a checkpoint without training: what must come out is known."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ds_dgemma.checkpoint.manifest import describe, write_state
from ds_dgemma.checkpoint.weights import WeightReader
from ds_dgemma.config.recorded import resolved_yaml
from ds_dgemma.config.run import RunConfig


def trained(tensor: torch.Tensor) -> torch.Tensor:
    """What training made of a tensor, fp32, with more digits than bf16 has."""
    return tensor.float() * 1.2345 + 1e-3


def was_trained(tensor: str) -> bool:
    return tensor.startswith("model.decoder.") and not tensor.endswith("layer_scalar")


def write_run(run_dir: Path, model: Path, precision: str) -> Path:
    """Write a run directory by hand: gate and up apart, each tensor's elements in two files."""
    files: list[dict[str, torch.Tensor]] = [{}, {}]
    intervals: list[dict[str, tuple[int, int]]] = [{}, {}]
    reader = WeightReader(model)
    for tensor in filter(was_trained, reader.files):
        value, name = trained(reader.read(tensor)), tensor.replace("model.decoder.", "model.")
        stem = name.rpartition(".")[0] + ".experts."
        parts = {name: value}
        if name.endswith("gate_up_proj"):
            parts = dict(zip((stem + "w1", stem + "w3"), value.chunk(2, dim=1), strict=True))
        elif name.endswith("experts.down_proj"):
            parts = {stem + "w2": value}
        for part, whole in parts.items():
            flat = whole.reshape(-1)
            cut = len(flat) * 2 // 5
            for rank, (first, last) in enumerate([(0, cut), (cut, len(flat))]):
                files[rank][f"{part}|fp32"] = flat[first:last].clone()
                intervals[rank][part] = (first, last)
    step = run_dir / "checkpoints/step-000003"
    step.mkdir(parents=True)
    for rank in range(2):
        save_file(files[rank], step / f"{rank}.safetensors", metadata={"intervals": json.dumps(intervals[rank])})
    write_state(step, {"step": 3, "adam_step": 3}, {file.name: describe(file) for file in step.iterdir()})
    steps = {"max_steps": 3, "global_batch_size": 1, "micro_batch_size": 1, "precision": precision}
    settings = {
        "run": {"dir": run_dir},
        "model": {"path": str(model)},
        "data": {"train": "train.jsonl"},
        "train": steps,
        "deepspeed": "zero3.json",
    }
    (run_dir / "config.yaml").write_text(resolved_yaml(RunConfig.model_validate(settings)))
    return run_dir
