"""Actions of any space, as tensors: composing steps, and what lies between two moments (see `ActionSpace`).

Suffixes: H steps, K numbers of an action.
"""

import numpy as np
import torch
from torch import Tensor

from cdit.common.motion import between, integrate
from cdit.data.action_space import ActionSpace
from cdit.data.source import TrajectorySource


def recorded_steps(trajectory: TrajectorySource, space: ActionSpace, first: int, last: int) -> Tensor:
    """The recorded actions (last - first, K) from each frame to the next, from frame `first` to `last`."""
    frames = np.arange(first, last + 1)
    return torch.from_numpy(space.between(trajectory, frames[:-1], frames[1:])).float()


def composed(steps: Tensor, space: ActionSpace) -> Tensor:
    """Steps (…, H, K) to the actions from the start to the end of each step, (…, H, K)."""
    if space.kind == "motion":
        return integrate(steps)
    return steps if space.kind == "absolute" else steps.cumsum(-2)


def since(earlier: Tensor, later: Tensor, space: ActionSpace) -> Tensor:
    """The actions between two moments, (…, K), from those from the start to each of them, (…, K)."""
    if space.kind == "motion":
        return between(earlier, later)
    return later if space.kind == "absolute" else later - earlier
