import numpy as np
import pytest

from cdit.common.statistics import Estimate, estimates
from cdit.heads.intervals import best_head, mean_estimates, split_halves

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


def test_the_best_is_chosen_on_one_half_and_reported_on_the_other():
    choosing = np.array([True, True, False, False])
    values = np.array([[1.0, 3, 2], [1, 3, 2], [5, 0, 2], [5, 4, np.nan]])
    best = best_head(values, choosing, "abcd")
    assert (best.column, best.chosen_at, best.estimate.mean) == (1, 3, 2)
    worst = best_head(values, choosing, "abcd", highest=False)
    assert (worst.column, worst.chosen_at, worst.estimate.mean) == (0, 1, 5)
    assert best_head(values, ~choosing, "abcd").column == 0


def test_the_winner_of_a_lottery_is_reported_as_average():
    """Of 100 equal heads the luckiest looks good where it was chosen, and is nothing special elsewhere."""
    draws, reported = np.random.default_rng(0), []
    names = [str(i) for i in range(40)]
    for _ in range(30):
        best = best_head(draws.normal(size=(40, 100)), split_halves(names), names)
        assert best.chosen_at > 0.3
        reported.append(best.estimate.mean)
    assert abs(np.mean(reported)) < 4 / np.sqrt(30 * 20)


def test_estimates_are_plain_numbers():
    assert isinstance(mean_estimates(np.ones((40, 1)), NAMES)[0], Estimate)
    assert mean_estimates(np.ones((40, 1)), NAMES) == [Estimate(1.0, 1.0, 1.0)]
