"""Choosing without selection bias: intervals over trajectories; heads chosen on one half of the samples, reported on
the other."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cdit.common.statistics import Estimate, estimates
from cdit.heads.correspondence import SCORES

if TYPE_CHECKING:
    from cdit.heads.head_statistics import HeadStatistics

QUESTIONS: Mapping[str, tuple[str, bool]] = {
    "finds the true place within the frames it attends to": ("correspondence lift", True),
    "puts the most weight on true places": ("correspondence share", True),
    "most often has its largest weight on a true place": ("correspondence accuracy", True),
    "attends to the patch's own place": ("same place", True),
    "attends farthest away": ("distance", True),
    "attends to edges": ("edge lift", True),
    "is sharpest": ("effective tokens", False),
    "is broadest": ("effective tokens", True),
    "has the largest scores": ("score range", True),
    "puts the most weight on the extra key": ("mass extra", True),
}
"""What a head can be best at: the measure, and whether higher is better."""


def mean_estimates(values: np.ndarray, trajectories: Sequence[Hashable], seed: int = 0) -> list[Estimate]:
    """The mean of each column with its 95 % interval by bootstrap over trajectories.

    Args:
        values: (S, C), one row per sample; values that are not finite are left out of their column.
        trajectories: S names.

    Returns:
        C estimates; NaN without interval for a column without any finite value.
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


@dataclass(frozen=True)
class Trend:
    """How a value of a head changes with one of several factors, the others held constant."""

    slope: Estimate
    """Value per unit of the factor; 0 if the factor does not vary independently."""
    correlation: float
    """Partial correlation in [-1, 1]; 0 if value or factor does not vary independently."""


def trends(values: np.ndarray, factors: np.ndarray, trajectories: Sequence[Hashable], seed: int = 0) -> list[Trend]:
    """Least squares of a value on an intercept and factors, such as the motion (dx, dy, dyaw).

    Intervals are bootstrapped over trajectories, to first order: the slope is the mean of the samples' influence values
    slope + n·zᵢ·eᵢ / Σz², where z is the residual of the factor given the other factors and e are the residuals of the
    fit; these values are resampled (Davison and Hinkley 1997, section 2.7). Values that are not finite are left out.

    Returns:
        F trends, for values (n,) and factors (n, F).
    """
    finite = np.isfinite(values)
    y, x = values[finite].astype(np.float64), factors[finite].astype(np.float64)
    names = [name for name, kept in zip(trajectories, finite, strict=True) if kept]
    none = Trend(Estimate(0.0, None, None), 0.0)
    if not names:
        return [none] * factors.shape[1]
    y, x = y - y.mean(), x - x.mean(axis=0)
    residual = _residual(y, x)
    found = []
    for i in range(x.shape[1]):
        others = np.delete(x, i, axis=1)
        z, left = _residual(x[:, i], others), _residual(y, others)
        if not _varies(z, factors[:, i]):
            found.append(none)
            continue
        slope = float(z @ left / (z @ z))
        influence = slope + len(z) * z * residual / (z @ z)
        correlation = float(z @ left / np.sqrt((z @ z) * (left @ left))) if _varies(left, values[finite]) else 0.0
        found.append(Trend(estimates(influence, names, seed)[0], correlation))
    return found


def _residual(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    return y - x @ np.linalg.lstsq(x, y, rcond=None)[0]


def _varies(residual: np.ndarray, whole: np.ndarray) -> bool:
    """Whether the residual is more than rounding error."""
    return bool(np.abs(residual).max() > 1e-6 * max(np.abs(whole).max(), 1e-6))


def split_halves(trajectories: Sequence[Hashable], seed: int = 0) -> np.ndarray | None:
    """(S,) bool, True for the samples that choose: those of a random half of the trajectories.

    With one trajectory there is no independent half; its first samples choose and the rest report. None if there are
    too few samples for two halves.
    """
    names = list(dict.fromkeys(trajectories))
    if len(names) == 1:
        choosing = np.arange(len(trajectories)) < len(trajectories) // 2
    else:
        drawn = np.random.default_rng(seed).permutation(len(names))[: len(names) // 2]
        chosen = {names[i] for i in drawn}
        choosing = np.array([name in chosen for name in trajectories])
    return choosing if choosing.any() and not choosing.all() else None


def reporting(trajectories: Sequence[Hashable], choosing: np.ndarray) -> list[Hashable]:
    """The trajectories of the samples that do not choose; see `split_halves`."""
    return [name for name, chose in zip(trajectories, choosing, strict=True) if not chose]


@dataclass(frozen=True)
class Best:
    """The column that was best on one half of the samples."""

    column: int
    chosen_at: float
    """Its mean on the half that chose it, which is biased upwards."""
    estimate: Estimate


def best_column(
    values: np.ndarray,
    choosing: np.ndarray,
    trajectories: Sequence[Hashable],
    highest: bool = True,
    seed: int = 0,
) -> Best:
    """The column with the highest (or lowest) mean on one half of the samples, reported on the other.

    Args:
        values: (S, C), such as a column for each head; values that are not finite are left out.
        choosing: (S,) bool, see `split_halves`.
        trajectories: S names.
    """
    means = np.array([estimate.mean for estimate in mean_estimates(values[choosing], ["one"] * int(choosing.sum()))])
    column = int(np.nanargmax(means if highest else -means))
    (estimate,) = mean_estimates(values[~choosing][:, [column]], reporting(trajectories, choosing), seed)
    return Best(column, float(means[column]), estimate)


def best_heads(statistics: "HeadStatistics", choosing: np.ndarray) -> list[tuple[str, str, str, Best]]:
    """For each of `QUESTIONS` that can be answered: the question, the measure, the head's name, and how good it is."""
    found = []
    for question, (measure, highest) in QUESTIONS.items():
        if measure in statistics.measures:
            values, names = statistics.values(measure)
            if np.isfinite(values[choosing]).any():
                best = best_column(values, choosing, statistics.trajectories, highest, statistics.seed)
                found.append((question, measure, names[best.column], best))
    return found


class BestScores(NamedTuple):
    """Of the head with the highest lift."""

    column: int
    head: str
    """With its layer and time."""
    scores: list[Estimate]
    """One for each of `SCORES`."""


def best_scores(statistics: "HeadStatistics", choosing: np.ndarray) -> BestScores | None:
    """The head with the highest lift on one half, and its `SCORES` on the other; None if nothing is visible."""
    values, names = statistics.values(SCORES[0])
    if not np.isfinite(values[choosing]).any():
        return None
    column = best_column(values, choosing, statistics.trajectories).column
    of_head = np.stack([statistics.values(score)[0][~choosing, column] for score in SCORES], axis=1)
    scores = mean_estimates(of_head, reporting(statistics.trajectories, choosing), statistics.seed)
    return BestScores(column, names[column], scores)


def accuracy_by_row(statistics: "HeadStatistics", choosing: np.ndarray, head: int) -> list[tuple[float, str, float]]:
    """How heads share the rows of the target's patches: the accuracy of one head and of the most accurate of each row.

    Args:
        head: a column of `HeadStatistics.values`.

    Returns:
        For each row: the accuracy of `head`, the most accurate head in this row on the half that chooses, and its
        accuracy; finally, without a head, both over all rows. Accuracies are of the other half, NaN if nothing is
        visible.
    """
    names = statistics.values(SCORES[0])[1]
    best = statistics.hits(np.flatnonzero(choosing))[0].sum(-1).argmax(0)
    hits, visible = (x.sum(-1) for x in statistics.hits(np.flatnonzero(~choosing)))  # (C, rows), (rows,)
    of_head, of_best = hits[head], hits.gather(0, best[None])[0]
    rows = zip((of_head / visible).tolist(), best.tolist(), (of_best / visible).tolist(), strict=True)
    whole = (float(of_head.sum() / visible.sum()), "", float(of_best.sum() / visible.sum()))
    return [*((one, names[column], other) for one, column, other in rows), whole]


def mean_scores(statistics: "HeadStatistics", choosing: np.ndarray) -> list[Estimate]:
    """`SCORES` averaged over all heads and times, on the half that reports."""
    means = np.stack([np.nanmean(statistics.values(score)[0][~choosing], axis=1) for score in SCORES], axis=1)
    return mean_estimates(means, reporting(statistics.trajectories, choosing), statistics.seed)
