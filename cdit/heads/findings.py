"""What the measures of a probe set say, told honestly: heads called best at something were chosen on other samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cdit.common.statistics import Estimate
from cdit.heads.intervals import Best, best_head, mean_estimates, reporting, split_halves
from cdit.heads.statistics import HeadStatistics
from cdit.heads.truth import SCORES

QUESTIONS: Mapping[str, tuple[str, bool]] = {
    "finds the true place, within the frames it looks at": ("correspondence lift", True),
    "puts most weight on true places": ("correspondence share", True),
    "looks at the true place most of all": ("correspondence accuracy", True),
    "looks straight back": ("same place", True),
    "looks farthest": ("distance", True),
    "looks at edges": ("edge lift", True),
    "is sharpest": ("effective tokens", False),
    "is broadest": ("effective tokens", True),
    "has the largest scores": ("score range", True),
    "rests on the extra key": ("mass extra", True),
}
"""By what a head is best at: the measure, and whether more of it is better."""


@dataclass(frozen=True)
class BestHead:
    """The head that is best at something."""

    question: str
    measure: str
    layer: int
    time: float
    head: int
    best: Best


def halves(trajectories: Sequence[str], seed: int) -> np.ndarray | None:
    """(S,) bool, see `split_halves`; None where there are too few samples for two halves."""
    choosing = split_halves(trajectories, seed)
    return choosing if choosing.any() and not choosing.all() else None


def best_heads(statistics: HeadStatistics, choosing: np.ndarray) -> list[BestHead]:
    """For each question that this attention has an answer to, the head that one half of the samples says is best."""
    found = []
    for question, (measure, highest) in QUESTIONS.items():
        if measure in statistics.measures:
            values, labels = statistics.values(measure)
            if np.isfinite(values[choosing]).any():
                best = best_head(values, choosing, statistics.trajectories, highest, statistics.seed)
                found.append(BestHead(question, measure, *labels[best.column], best))
    return found


def best_scores(statistics: HeadStatistics, choosing: np.ndarray) -> tuple[str, dict[str, Estimate]] | None:
    """The correspondence of the head with the highest lift on one half, and `SCORES` on the other; None without any."""
    values, labels = statistics.values(SCORES[0])
    if not np.isfinite(values[choosing]).any():
        return None
    column = best_head(values, choosing, statistics.trajectories).column
    others = reporting(statistics.trajectories, choosing)
    of_head = np.stack([statistics.values(score)[0][~choosing, column] for score in SCORES], axis=1)
    layer, time, head = labels[column]
    estimates = mean_estimates(of_head, others, statistics.seed)
    return f"layer {layer}, head {head}, t = {time:g}", dict(zip(SCORES, estimates, strict=True))


def mean_scores(statistics: HeadStatistics, choosing: np.ndarray) -> dict[str, Estimate]:
    """`SCORES` of all heads and times on the half that reports."""
    others = reporting(statistics.trajectories, choosing)
    means = np.stack([np.nanmean(statistics.values(score)[0][~choosing], axis=1) for score in SCORES], axis=1)
    return dict(zip(SCORES, mean_estimates(means, others, statistics.seed), strict=True))
