"""Metrics, sinks, plots."""
