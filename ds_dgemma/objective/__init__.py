"""Noise and losses: pure, no ranks."""
