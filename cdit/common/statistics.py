"""Confidence intervals of means by bootstrap over trajectories.

Samples of one trajectory are correlated, so resampling single samples would make intervals too narrow. Whole
trajectories are resampled instead, and every statistic is the mean over all samples of the drawn ones (the cluster
bootstrap: Davison and Hinkley 1997, section 3.8; Field and Welsh 2007).

With few trajectories percentile intervals are too narrow as well: resamples vary less than the data by a factor
√((n - 1) / n), and they use normal quantiles in place of Student's (Hesterberg 2015, "What Teachers Should Know About
the Bootstrap", sections 3.2 and 5). Both are corrected for, by scaling the percentiles' distances from the mean.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float | None
    """None with fewer than two trajectories."""
    high: float | None

    def __format__(self, spec: str) -> str:
        """The mean and half the width of the interval: f"{estimate:.2f}" is "1.23 ± 0.45"."""
        half = "" if self.low is None else f" ± {(self.high - self.low) / 2:{spec.removeprefix('+')}}"
        return f"{self.mean:{spec}}{half}"


def estimates(
    values: np.ndarray, trajectories: Sequence[Hashable], seed: int = 0, resamples: int = RESAMPLES
) -> list[Estimate]:
    """The mean of each column with its interval.

    Args:
        values: (N,) or (N, M), one row per sample. All columns see the same resamples.
        trajectories: N names; samples of the same name are drawn together.

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
    low, high = means + small_sample_scale(count) * (np.quantile(resampled, (0.025, 0.975), axis=0) - means)
    return [Estimate(*map(float, row)) for row in zip(means, low, high, strict=True)]


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    trajectories: Sequence[Hashable],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[Estimate]:
    """The mean of `first` minus `second` with its interval, sample by sample: what both find difficult cancels.

    Args:
        first: (N,) or (N, M), one row per sample.
        second: values of the same samples in the same order.

    Raises:
        ValueError: the shapes differ.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired values must have the same shape, got {first.shape} and {second.shape}")
    return estimates(first - second, trajectories, seed, resamples)


def estimate_of_runs(values: Sequence[float]) -> Estimate:
    """The mean over independent runs, such as training runs with several seeds, with Student's 95 % interval."""
    values = np.asarray(values, np.float64)
    count, mean = len(values), float(values.mean())
    if count < 2:
        return Estimate(mean, None, None)
    half = math.sqrt(count - 1) * _student_tangent(count) * float(values.std(ddof=1)) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half)


def small_sample_scale(count: int) -> float:
    """Factor by which a 95 % percentile interval over n ≥ 2 trajectories is widened: √(n / (n - 1)) · t / z."""
    return math.sqrt(count) * _student_tangent(count) / 1.959964


@cache
def _student_tangent(count: int) -> float:
    """The 97.5 % quantile of Student's t with n - 1 degrees of freedom, over √(n - 1)."""
    # Student's t with ν = n - 1 degrees of freedom is √ν·tan(θ), where θ has a density proportional to cos(θ)^(ν - 1).
    angles = (np.arange(200_000) + 0.5) / 200_000 * math.pi - math.pi / 2
    density = np.cos(angles) ** (count - 2)
    return math.tan(np.interp(0.975, (density.cumsum() - density / 2) / density.sum(), angles))
