"""Datasets: trajectories and their sources, windows, the loader, latents, shards, checks."""
