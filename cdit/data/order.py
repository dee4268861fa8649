"""The order in which an epoch visits the windows of a dataset, as a function of (seed, epoch)."""

import numpy as np

from cdit.common.randomness import seed_of


def shuffled(windows: int, seed: int, epoch: int) -> np.ndarray:
    """A uniformly random permutation (windows,) int64."""
    return np.random.default_rng(seed_of(seed, epoch)).permutation(windows)


def laned(bounds: np.ndarray, seed: int, epoch: int, lanes: int, reach: int) -> np.ndarray:
    """A permutation of windows in shards that needs few shards at a time.

    The shards are permuted, their windows concatenated, and the sequence is split into equal lanes. Position n of the
    epoch is position n // lanes of lane n % lanes: neighbours come from different parts of the dataset, and processes
    that take every P-th position read only their own lanes, if P divides the number of lanes. Within its lane each
    window is delayed by a random distance of up to `reach` shards, so that a lane needs at most reach + 1 shards at any
    time, and never returns to one.

    Args:
        bounds: (S + 1,) start of the windows of each shard, and the end of the last.
        reach: number of shards over which windows are shuffled, at least 1.

    Returns:
        (W,) int64.
    """
    random = np.random.default_rng(seed_of(seed, epoch))
    shards = random.permutation(len(bounds) - 1)
    line = np.concatenate([np.arange(bounds[shard], bounds[shard + 1]) for shard in shards])
    # The position of each window in the sequence, in shards, and when it is visited.
    sizes = np.diff(bounds)[shards]
    along = np.repeat(np.arange(len(shards)) - np.cumsum([0, *sizes[:-1]]) / np.maximum(sizes, 1), sizes)
    turn = along + np.arange(len(line)) / np.repeat(sizes, sizes) + reach * random.random(len(line))
    order = np.empty_like(line)
    end = 0
    for lane in range(lanes):
        start, end = end, end + len(order[lane::lanes])
        order[lane::lanes] = line[start:end][np.argsort(turn[start:end], kind="stable")]
    return order
