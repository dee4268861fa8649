"""In which order an epoch visits the windows of a dataset, as a function of (seed, epoch) alone."""

import numpy as np

from cdit.randomness import seed_of


def shuffled(windows: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation (windows,) int64, each equally likely."""
    return np.random.default_rng(seed_of(seed, epoch)).permutation(windows)
