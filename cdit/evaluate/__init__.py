"""Metrics, baselines and protocols."""
