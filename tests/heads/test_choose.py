import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cdit.common.statistics import estimates
from cdit.heads.choose import accuracy_by_row, best_column, mean_estimates, split_halves, trends

NAMES = [f"trajectory {i // 4}" for i in range(40)]


def test_each_column_is_estimated_from_the_samples_that_have_a_number():
    values = np.random.default_rng(0).normal(size=(40, 4))
    values[3:9, 1] = np.nan
    values[:, 2] = np.inf
    found = mean_estimates(values, NAMES)
    assert [found[0], found[3]] == estimates(values[:, [0, 3]], NAMES)
    kept = [*range(3), *range(9, 40)]
    assert found[1] == estimates(values[kept, 1], [NAMES[i] for i in kept])[0]
    assert found[1].mean == pytest.approx(values[kept, 1].mean())
    assert np.isnan(found[2].mean)
    assert (found[2].low, found[2].high) == (None, None)


def test_halves_part_trajectories_not_samples():
    choosing = split_halves(NAMES, seed=1)
    assert choosing.sum() == 20
    assert {n for n, c in zip(NAMES, choosing, strict=True) if c}.isdisjoint(
        n for n, c in zip(NAMES, choosing, strict=True) if not c
    )
    assert not np.array_equal(choosing, split_halves(NAMES, seed=2))
    assert split_halves(["a"] * 5).tolist() == [True, True, False, False, False]
    assert split_halves(["a"]) is None


def test_the_best_is_chosen_on_one_half_and_reported_on_the_other():
    choosing = np.array([True, True, False, False])
    values = np.array([[1.0, 3, 2], [1, 3, 2], [5, 0, 2], [5, 4, np.nan]])
    best = best_column(values, choosing, "abcd")
    assert (best.column, best.chosen_at, best.estimate.mean) == (1, 3, 2)
    worst = best_column(values, choosing, "abcd", highest=False)
    assert (worst.column, worst.chosen_at, worst.estimate.mean) == (0, 1, 5)
    assert best_column(values, ~choosing, "abcd").column == 0


def test_the_best_head_of_each_row_is_chosen_on_one_half_and_reported_on_the_other():
    """Two heads, two rows of two patches, one sample that chooses and one that reports."""
    hits = torch.tensor([[[[9, 9], [1, 1]], [[2, 2], [8, 8]]], [[[4, 2], [3, 3]], [[9, 9], [5, 7]]]])
    visible = torch.full((2, 2), 10)
    statistics = SimpleNamespace(
        values=lambda measure: (None, ["upper", "lower"]), hits=lambda samples: (hits[samples].sum(0), visible)
    )
    found = accuracy_by_row(statistics, np.array([True, False]), head=0)
    assert found == [
        (pytest.approx(0.3), "upper", pytest.approx(0.3)),
        (pytest.approx(0.3), "lower", pytest.approx(0.6)),
        (pytest.approx(0.3), "", pytest.approx(0.45)),
    ]


def test_the_winner_of_a_lottery_is_reported_as_average():
    """Of 100 equal heads the luckiest looks good where it was chosen, and is nothing special elsewhere."""
    draws, reported = np.random.default_rng(0), []
    names = [str(i) for i in range(40)]
    for _ in range(30):
        best = best_column(draws.normal(size=(40, 100)), split_halves(names), names)
        assert best.chosen_at > 0.3
        reported.append(best.estimate.mean)
    assert abs(np.mean(reported)) < 4 / np.sqrt(30 * 20)


def test_slopes_are_those_of_ordinary_least_squares():
    draws = np.random.default_rng(1)
    factors = draws.normal(size=(60, 3))
    factors[:, 2] += 0.8 * factors[:, 0]
    values = 2 * factors[:, 0] - 3 * factors[:, 2] + 5 + draws.normal(size=60)
    design = np.column_stack((np.ones(60), factors))
    expected = np.linalg.lstsq(design, values, rcond=None)[0][1:]
    found = trends(values, factors, list(range(60)))
    np.testing.assert_allclose([trend.slope.mean for trend in found], expected, rtol=1e-10)
    # The partial correlation from the inverse of the correlation matrix.
    precision = np.linalg.inv(np.corrcoef(np.column_stack((values, factors)).T))
    partial = [-precision[0, i] / math.sqrt(precision[0, 0] * precision[i, i]) for i in (1, 2, 3)]
    np.testing.assert_allclose([trend.correlation for trend in found], partial, rtol=1e-8)


def test_intervals_are_as_wide_as_the_standard_error_says():
    draws = np.random.default_rng(2)
    factor = draws.normal(size=(400, 1))
    noise = draws.normal(size=400)
    (trend,) = trends(1.5 * factor[:, 0] + noise, factor, list(range(400)))
    error = 1.96 / math.sqrt(400)
    assert trend.slope.high - trend.slope.low == pytest.approx(2 * error, rel=0.2)
    assert trend.slope.low < 1.5 < trend.slope.high


def test_what_does_not_vary_has_no_trend():
    factors = np.column_stack((np.arange(6.0), np.full(6, 0.1), 2 * np.arange(6.0)))
    found = trends(np.arange(6.0), factors, "aabbcc")
    assert [(trend.slope.mean, trend.correlation) for trend in found] == [(0, 0)] * 3  # the third repeats the first
    (flat,) = trends(np.full(6, 0.3), factors[:, :1], "aabbcc")
    assert flat.slope.mean == pytest.approx(0)
    assert flat.correlation == 0


def test_samples_without_a_number_are_left_out():
    values, factors = np.array([0.0, 2, 4, np.nan, 8]), np.arange(5.0)[:, None]
    assert trends(values, factors, "abcde")[0].slope.mean == pytest.approx(2)
    assert trends(np.full(5, np.nan), factors, "abcde")[0].correlation == 0
