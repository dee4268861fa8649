"""Randomness as a function of a key, so that a result does not depend on who computed it or in which order.

Every random draw of a run belongs to a key such as (seed, step, sample). Two processes that meet the same key draw the
same numbers, whatever they drew before: losses are the same at any process count, batch split or resume.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def seed_of(*key: int) -> int:
    """A well-mixed seed in [0, 2^63) for a key of non-negative integers, the same on every platform."""
    # The length goes in because SeedSequence fills up with zeros: (1,) and (1, 0) would be one key.
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0] >> 1)


def generator(*key: int, device: "torch.device | str" = "cpu") -> "torch.Generator":
    """A torch generator on `device`, seeded by a key of non-negative integers."""
    import torch  # here, for commands that draw seeds only

    return torch.Generator(device).manual_seed(seed_of(*key))
