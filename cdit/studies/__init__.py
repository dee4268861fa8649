"""Experiments on top of evaluation: ablations, sampler settings, turning."""
