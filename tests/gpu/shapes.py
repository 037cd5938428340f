"""The released model's shapes with a chosen number of layers, and a miniature of them to rehearse with."""

from typing import Any

import torch
from transformers import DiffusionGemmaConfig

from ds_dgemma.tools.tiny import small_config

RELEASED: dict[str, int] = {
    "vocab_size": 262_144,
    "hidden_size": 2816,
    "intermediate_size": 2112,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "num_global_key_value_heads": 2,
    "global_head_dim": 512,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 704,
    "sliding_window": 1024,
}
MINIATURE: dict[str, int] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_global_key_value_heads": 1,
    "global_head_dim": 32,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
    "sliding_window": 32,
}


def config(rehearse: bool, layers: int, **changes: int) -> DiffusionGemmaConfig:
    """A config of `layers` layers, the last one with full attention, the others sliding; the smallest vision tower."""
    text: dict[str, Any] = {**(MINIATURE if rehearse else RELEASED), **changes}
    text |= {
        "num_hidden_layers": layers,
        "layer_types": ["sliding_attention"] * (layers - 1) + ["full_attention"],
        "max_position_embeddings": 4096,
    }
    return small_config(text, lengths(rehearse)[1])


def lengths(rehearse: bool) -> tuple[int, int, int]:
    """Clean tokens of a row, tokens of its canvas, rows of a micro-batch."""
    return (64, 16, 2) if rehearse else (1024, 256, 4)


def device(rehearse: bool) -> torch.device:
    """Where the checks run."""
    return torch.device("cpu" if rehearse else "cuda")
