"""Honest numbers over a probe set: means with intervals, and winners told on samples that did not choose them."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from cdit.common.statistics import Estimate, estimates


def mean_estimates(values: np.ndarray, trajectories: Sequence[Hashable], seed: int = 0) -> list[Estimate]:
    """The mean of each column with its 95 % interval by bootstrap over trajectories.

    Args:
        values: (S, C), a row for each sample; what is not finite is left out of its column.
        trajectories: S names.
        seed: of the resamples.

    Returns:
        C estimates; NaN without interval for a column without any number.
    """
    finite = np.isfinite(values)
    found: list[Estimate | None] = [None] * values.shape[1]
    whole = np.flatnonzero(finite.all(axis=0))
    if len(whole):
        for column, estimate in zip(whole, estimates(values[:, whole], trajectories, seed), strict=True):
            found[column] = estimate
    for column in np.flatnonzero(~finite.all(axis=0)):
        kept = np.flatnonzero(finite[:, column])
        names = [trajectories[i] for i in kept]
        found[column] = estimates(values[kept, column], names, seed)[0] if names else Estimate(np.nan, None, None)
    return found


def split_halves(trajectories: Sequence[Hashable], seed: int = 0) -> np.ndarray:
    """(S,) bool, True for the samples that choose: those of half of the trajectories, drawn by the seed.

    With one trajectory there is no independent half, and its first samples choose for the rest.
    """
    names = list(dict.fromkeys(trajectories))
    if len(names) == 1:
        return np.arange(len(trajectories)) < len(trajectories) // 2
    drawn = np.random.default_rng(seed).permutation(len(names))[: len(names) // 2]
    choosing = {names[i] for i in drawn}
    return np.array([name in choosing for name in trajectories])


def reporting(trajectories: Sequence[Hashable], choosing: np.ndarray) -> list[Hashable]:
    """The trajectories of the samples that do not choose, which report; both arguments as in `best_head`."""
    return [name for name, chose in zip(trajectories, choosing, strict=True) if not chose]


@dataclass(frozen=True)
class Best:
    """A column that was the best on one half of the samples."""

    column: int
    """Which."""
    chosen_at: float
    """Its mean on the half that chose it: too good, as the winner's luck is in it."""
    estimate: Estimate
    """Its mean on the other half."""


def best_head(
    values: np.ndarray,
    choosing: np.ndarray,
    trajectories: Sequence[Hashable],
    highest: bool = True,
    seed: int = 0,
) -> Best:
    """The head with the highest (or lowest) mean on one half of the samples, reported on the other.

    Args:
        values: (S, C), a column for each head; what is not finite is left out.
        choosing: (S,) bool, see `split_halves`.
        trajectories: S names.
        highest: whether more is better.
        seed: of the resamples.
    """
    means = np.array([estimate.mean for estimate in mean_estimates(values[choosing], ["one"] * int(choosing.sum()))])
    column = int(np.nanargmax(means if highest else -means))
    (estimate,) = mean_estimates(values[~choosing][:, [column]], reporting(trajectories, choosing), seed)
    return Best(column, float(means[column]), estimate)
