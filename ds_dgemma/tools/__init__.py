"""Small checkpoints of random weights."""
