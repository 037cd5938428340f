"""Conversations to batches."""
