"""Experiments on top of evaluation: ablations, sampler settings, turning, quality and heads over training time."""
