"""Small checkpoints and checks."""
