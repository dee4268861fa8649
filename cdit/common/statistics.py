"""Confidence intervals of means by bootstrap over trajectories.

Samples of one trajectory resemble each other, so that drawing single samples would make intervals too narrow. Whole
trajectories are drawn instead, with replacement, as many as there are, and every statistic is the mean over all samples
of the drawn ones (the cluster bootstrap: Davison and Hinkley 1997, section 3.8; Field and Welsh 2007).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A mean, and where it lies in 95 % of the resamples."""

    mean: float
    low: float | None
    """The 2.5 % quantile; None with fewer than two trajectories."""
    high: float | None
    """The 97.5 % quantile."""


def estimates(
    values: np.ndarray, trajectories: Sequence[Hashable], seed: int = 0, resamples: int = RESAMPLES
) -> list[Estimate]:
    """The mean of each column, with its interval.

    Args:
        values: (N,) or (N, M) numbers, a row for each sample. All columns see the same resamples.
        trajectories: N names; samples of the same name are drawn together.
        seed: of the resamples.
        resamples: how many.

    Returns:
        M estimates, one for (N,).
    """
    values = np.asarray(values, np.float64).reshape(len(trajectories), -1)
    means = values.mean(axis=0)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(trajectories))}
    count = len(numbers)
    if count < 2:
        return [Estimate(float(mean), None, None) for mean in means]
    of_sample = np.array([numbers[name] for name in trajectories])
    sums = np.zeros((count, values.shape[1]))
    np.add.at(sums, of_sample, values)
    sizes = np.bincount(of_sample, minlength=count)
    # How often each trajectory is drawn: (resamples, count). A mean weighs by samples, not by trajectories.
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    resampled = (draws @ sums) / (draws @ sizes)[:, None]
    low, high = np.quantile(resampled, (0.025, 0.975), axis=0)
    return [Estimate(*map(float, row)) for row in zip(means, low, high, strict=True)]


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    trajectories: Sequence[Hashable],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[Estimate]:
    """The mean of `first` minus `second`, with its interval; what both found difficult cancels.

    Args:
        first: (N,) or (N, M) numbers, a row for each sample.
        second: numbers of the same samples in the same order.
        trajectories: N names, the samples' own.
        seed: of the resamples.
        resamples: how many.

    Raises:
        ValueError: the shapes differ.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"pairs of values have the same shape, not {first.shape} and {second.shape}")
    return estimates(first - second, trajectories, seed, resamples)
