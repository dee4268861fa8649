import math

import numpy as np
import pytest

from cdit.common.statistics import Estimate, estimate_of_runs, estimates, paired_difference


def brute_force(values: np.ndarray, names: list[str], seed: int, resamples: int) -> tuple[float, float]:
    """Percentiles of the means of resamples, drawing trajectories one by one and concatenating their samples."""
    random = np.random.default_rng(seed)
    groups = [values[[n == name for n in names]] for name in dict.fromkeys(names)]
    means = []
    for _ in range(resamples):
        drawn = [groups[i] for i in random.integers(len(groups), size=len(groups))]
        means.append(np.concatenate(drawn).mean())
    return tuple(np.quantile(means, (0.025, 0.975)))


def test_a_loop_over_resamples_finds_the_same_interval():
    """Trajectories of very different sizes, whose means depend on their size; widened for eight of them."""
    random = np.random.default_rng(0)
    sizes = [1, 2, 3, 5, 8, 13, 21, 34]
    names = [f"t{i}" for i, size in enumerate(sizes) for _ in range(size)]
    values = np.concatenate([random.normal(size / 10, 0.3, size) for size in sizes])
    shuffled = random.permutation(len(names))
    names, values = [names[i] for i in shuffled], values[shuffled]
    (found,) = estimates(values, names, resamples=20000)
    low, high = brute_force(values, names, seed=1, resamples=20000)
    wider = math.sqrt(8 / 7) * 2.364624 / 1.959964  # Student's 97.5 % quantile with 7 degrees of freedom
    assert found.mean == pytest.approx(values.mean())
    assert found.low - found.mean == pytest.approx(wider * (low - found.mean), abs=0.02 * (high - low))
    assert found.high - found.mean == pytest.approx(wider * (high - found.mean), abs=0.02 * (high - low))


@pytest.mark.parametrize(("clusters", "quantile"), [(2, 12.7062), (5, 2.77645), (400, 1.96593)])
def test_normal_theory_for_clusters_of_one_size(clusters: int, quantile: float):
    """The width is that of Student's interval for the clusters' means."""
    random = np.random.default_rng(0)
    values = random.normal(size=(clusters, 1)) + random.normal(size=(clusters, 5))
    (found,) = estimates(values.reshape(-1), np.repeat(np.arange(clusters), 5).tolist(), resamples=20000)
    error = values.mean(axis=1).std(ddof=1) / math.sqrt(clusters)
    # The means of few clusters have few resamples, whose percentiles are not those of a normal distribution.
    assert (found.high - found.low) / (2 * error) == pytest.approx(quantile, rel=0.05 if clusters > 2 else 0.5)


@pytest.mark.parametrize("clusters", [6, 11, 30])
@pytest.mark.parametrize("skewness", [0, 1])
def test_intervals_cover_the_truth_as_often_as_they_promise(clusters: int, skewness: int):
    """Of 10 000 studies with correlated samples; the true mean is 0. Intervals over single samples do not."""
    random, size = np.random.default_rng(0), 10
    names = np.repeat(np.arange(clusters), size).tolist()
    covered, naive = [], []
    for seed in range(20):
        shape = (clusters, 1, 500)  # a gamma distribution of shape 4 has a skewness of 1
        common = random.gamma(4, size=shape) / 2 - 2 if skewness else random.normal(size=shape)
        values = (common + random.normal(size=(clusters, size, 500))).reshape(-1, 500)
        covered += [found.low <= 0 <= found.high for found in estimates(values, names, seed)]
        if seed == 0:
            naive = [found.low <= 0 <= found.high for found in estimates(values, range(len(values)), seed)]
    assert 0.93 <= np.mean(covered) <= 0.97
    assert np.mean(naive) < 0.7


def test_columns_share_resamples_and_the_seed_counts():
    random = np.random.default_rng(0)
    names = [f"t{i % 7}" for i in range(50)]
    values = random.normal(size=(50, 1))
    one, twice = estimates(np.concatenate((values, 2 * values), axis=1), names)
    assert (twice.low, twice.high) == pytest.approx((2 * one.low, 2 * one.high))
    assert estimates(values, names) == estimates(values, names)
    assert estimates(values, names, seed=1) != estimates(values, names)


def test_one_trajectory_has_no_interval():
    (found,) = estimates(np.array([1.0, 3.0]), ["only", "only"])
    assert (found.mean, found.low, found.high) == (2.0, None, None)


def test_a_constant_difference_is_certain_however_much_both_vary():
    random = np.random.default_rng(0)
    names = [f"t{i % 9}" for i in range(60)]
    first = random.normal(size=60)
    (difference,) = paired_difference(first, first - 0.25, names)
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0.25, 0.25, 0.25))
    (unpaired,) = estimates(first, names)
    assert unpaired.high - unpaired.low > 0.1
    # A difference of alternating sign within the trajectories is not.
    (noisy,) = paired_difference(first, first + random.normal(size=60), names)
    assert noisy.high - noisy.low > 0.1


def test_values_that_are_no_pairs():
    with pytest.raises(ValueError, match="same shape"):
        paired_difference(np.zeros(3), np.zeros((3, 1)), ["a", "b", "c"])


@pytest.mark.parametrize(("count", "quantile"), [(2, 12.7062), (3, 4.3027), (5, 2.7764), (11, 2.2281)])
def test_runs_have_students_interval(count: int, quantile: float):
    values = np.random.default_rng(0).normal(3, 0.1, count)
    found = estimate_of_runs(list(values))
    assert found.mean == pytest.approx(values.mean())
    half = quantile * values.std(ddof=1) / math.sqrt(count)
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), rel=1e-4)


def test_one_run_has_no_interval():
    assert estimate_of_runs([2.0]) == Estimate(2.0, None, None)


def test_estimates_are_written_with_half_their_interval():
    estimate = Estimate(0.5, 0.375, 0.875)
    assert f"{estimate:.2f}" == "0.50 ± 0.25"
    assert f"{estimate:+.2f}" == "+0.50 ± 0.25"
    assert f"{estimate:.0%}" == "50% ± 25%"
    assert f"{Estimate(0.5, None, None):+.1f}" == "+0.5"
