"""Randomness as a function of a key, so that results do not depend on which process computes them, or in which order.

Every random draw of a run belongs to a key such as (seed, step, sample). Two processes with the same key draw the
same numbers, whatever they drew before: losses are the same for any number of processes, batch split or resume.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def seed_of(*key: int) -> int:
    """A well-mixed seed in [0, 2^63) for a key of non-negative integers, the same on every platform."""
    # The length is included because SeedSequence pads with zeros: (1,) and (1, 0) would be the same key.
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0] >> 1)


def generator(*key: int, device: "torch.device | str" = "cpu") -> "torch.Generator":
    """A torch generator on `device`, seeded by a key of non-negative integers."""
    import torch  # here, for commands that draw seeds only

    return torch.Generator(device).manual_seed(seed_of(*key))
