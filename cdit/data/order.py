"""In which order an epoch visits the windows of a dataset, as a function of (seed, epoch) alone."""

import numpy as np

from cdit.common.randomness import seed_of


def shuffled(windows: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation (windows,) int64, each equally likely."""
    return np.random.default_rng(seed_of(seed, epoch)).permutation(windows)


def laned(bounds: np.ndarray, seed: int, epoch: int, lanes: int, reach: int) -> np.ndarray:
    """A permutation of windows that lie in shards, in which few shards are needed at a time.

    The shards are permuted, their windows laid out in a line, and the line cut into equal lanes. Place n of the epoch
    is place n // lanes of lane n % lanes: neighbours come from different parts of the dataset, and processes that take
    every P-th place read only their own lanes, where P divides the number of lanes. Along its lane each window is held
    back by a random stretch of up to `reach` shards, so that a lane needs at most reach + 1 shards at any time, and
    none again that it has left behind.

    Args:
        bounds: (S + 1,) where the windows of each shard begin, and where the last ones end.
        seed: first part of the permutation's key.
        epoch: second part.
        lanes: number of lanes, at least 1.
        reach: over how many shards windows are mixed, at least 1.

    Returns:
        (W,) int64.
    """
    random = np.random.default_rng(seed_of(seed, epoch))
    shards = random.permutation(len(bounds) - 1)
    line = np.concatenate([np.arange(bounds[shard], bounds[shard + 1]) for shard in shards])
    # How far along the line a window lies, in shards, and when its turn comes.
    sizes = np.diff(bounds)[shards]
    along = np.repeat(np.arange(len(shards)) - np.cumsum([0, *sizes[:-1]]) / np.maximum(sizes, 1), sizes)
    turn = along + np.arange(len(line)) / np.repeat(sizes, sizes) + reach * random.random(len(line))
    order = np.empty_like(line)
    end = 0
    for lane in range(lanes):
        start, end = end, end + len(order[lane::lanes])
        order[lane::lanes] = line[start:end][np.argsort(turn[start:end], kind="stable")]
    return order
