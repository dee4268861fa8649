import math

import numpy as np
import pytest

from cdit.common.statistics import estimates, paired_difference


def brute_force(values: np.ndarray, names: list[str], seed: int, resamples: int) -> tuple[float, float]:
    """Draws trajectories one by one and puts their samples together."""
    random = np.random.default_rng(seed)
    groups = [values[[n == name for n in names]] for name in dict.fromkeys(names)]
    means = []
    for _ in range(resamples):
        drawn = [groups[i] for i in random.integers(len(groups), size=len(groups))]
        means.append(np.concatenate(drawn).mean())
    return tuple(np.quantile(means, (0.025, 0.975)))


def test_a_loop_over_resamples_finds_the_same_interval():
    """Trajectories of very different sizes, whose means depend on their size."""
    random = np.random.default_rng(0)
    sizes = [1, 2, 3, 5, 8, 13, 21, 34]
    names = [f"t{i}" for i, size in enumerate(sizes) for _ in range(size)]
    values = np.concatenate([random.normal(size / 10, 0.3, size) for size in sizes])
    shuffled = random.permutation(len(names))
    names, values = [names[i] for i in shuffled], values[shuffled]
    (found,) = estimates(values, names, resamples=20000)
    low, high = brute_force(values, names, seed=1, resamples=20000)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(low, abs=0.02 * (high - low))
    assert found.high == pytest.approx(high, abs=0.02 * (high - low))


def test_normal_theory_for_many_clusters_of_one_size():
    """The interval is the mean ± 1.96 standard errors of the clusters' means."""
    random = np.random.default_rng(0)
    clusters, size = 400, 5
    values = random.normal(size=(clusters, 1)) + random.normal(size=(clusters, size))
    (found,) = estimates(values.reshape(-1), np.repeat(np.arange(clusters), size).tolist(), resamples=20000)
    error = values.mean(axis=1).std() / math.sqrt(clusters)
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.05 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.05 * error)


def test_it_covers_the_truth_where_single_samples_would_not():
    """Of 300 studies with 30 correlated trajectories each, about 95 % of the intervals hold the true mean, 0."""
    random = np.random.default_rng(0)
    clusters, size, studies = 30, 20, 300
    names = np.repeat(np.arange(clusters), size).tolist()
    covered = covered_naively = 0
    for study in range(studies):
        values = (random.normal(size=(clusters, 1)) + random.normal(size=(clusters, size))).reshape(-1)
        (found,) = estimates(values, names, seed=study, resamples=300)
        (naive,) = estimates(values, list(range(len(values))), seed=study, resamples=300)
        covered += found.low <= 0 <= found.high
        covered_naively += naive.low <= 0 <= naive.high
    assert 0.90 <= covered / studies <= 0.98
    assert covered_naively / studies < 0.6


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
