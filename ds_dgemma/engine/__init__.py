"""Ranks and DeepSpeed."""
