"""Families of actions with few parameters, and the distribution of these parameters in a dataset.

Suffixes: N windows, K knots, H frames, D numbers of an action (3 for motion).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cdit.common.motion import integrate, wrap
from cdit.data.action_space import ActionSpace
from cdit.data.source import TrajectorySource
from cdit.plan.actions import recorded_steps

MOTION = ActionSpace()
MOST_RECORDED = 20_000
"""Largest number of recorded windows that a distribution is measured on."""


class Family(Protocol):
    """Maps parameters (…, K, D), chosen by an optimiser, to steps (…, H, D) in the units of the actions."""

    knots: int
    horizon: int

    def actions(self, values: Tensor) -> Tensor:
        """The steps (…, H, D) of parameters (…, K, D)."""

    def values(self, actions: Tensor) -> Tensor:
        """The parameters (…, K, D) whose steps are close to given ones (…, H, D)."""


@dataclass(frozen=True)
class Constant:
    """A straight line at constant speed, and one turn at its end: the three parameters of NWM's planner.

    These are dx and dy of every step in the frame at the start, and the final turn. The first step turns into the
    direction of motion.
    """

    horizon: int
    knots: int = 1

    def actions(self, values: Tensor) -> Tensor:
        """See `Family`."""
        dx, dy, turn = values[..., 0, :].unbind(-1)
        steps = values.new_zeros(*values.shape[:-2], self.horizon, 3)
        steps[..., 0] = torch.hypot(dx, dy)[..., None]
        steps[..., 0, :] = torch.stack((dx, dy, torch.atan2(dy, dx)), dim=-1)
        steps[..., -1, 2] += turn
        return steps

    def values(self, actions: Tensor) -> Tensor:
        """The line to the same final pose."""
        x, y, yaw = integrate(actions)[..., -1, :].unbind(-1)
        found = torch.stack((x / self.horizon, y / self.horizon, wrap(yaw - torch.atan2(y, x))), dim=-1)
        return found[..., None, :]


@dataclass(frozen=True)
class Spline:
    """Steps interpolated linearly between K knots; with K = H every step is free."""

    horizon: int
    knots: int

    @property
    def weights(self) -> Tensor:
        """(H, K)."""
        place = torch.linspace(0, self.knots - 1, self.horizon)[:, None]
        return (1 - (place - torch.arange(self.knots)).abs()).clamp(min=0)

    def actions(self, values: Tensor) -> Tensor:
        """See `Family`."""
        return self.weights.to(values) @ values

    def values(self, actions: Tensor) -> Tensor:
        """By least squares."""
        return torch.linalg.pinv(self.weights).to(actions) @ actions


def make_family(name: str, horizon: int, knots: int) -> Family:
    """A family by its name in `PlannerConfig.candidates`."""
    if name == "constant":
        return Constant(horizon)
    return Spline(horizon, horizon if name == "steps" else min(knots, horizon))


@dataclass(frozen=True)
class Prior:
    """The distribution of a dataset's actions in the parameters of a family."""

    mean: Tensor
    """(K, D)."""
    std: Tensor
    """(K, D)."""
    low: Tensor
    """(K, D), bounds of candidates."""
    high: Tensor
    """(K, D)."""
    recorded: Tensor
    """(N, K, D), of N recorded windows, to draw candidates from."""

    @classmethod
    def fit(cls, family: Family, actions: Tensor, outside: float = 0.005) -> "Prior":
        """The prior of recorded steps (N, H, D).

        Args:
            family: defines the parameters.
            actions: of N windows.
            outside: fraction of the data beyond each bound.
        """
        values = family.values(actions.double())
        bounds = torch.quantile(values.flatten(0, 1) if family.knots > 1 else values[:, 0], _ends(outside), dim=0)
        low, high = (bound.expand(family.knots, -1) for bound in bounds)
        pooled = values.clamp(low, high)
        moments = pooled.mean(0), pooled.std(0)
        return cls(*(x.float() for x in (*moments, low, high, pooled)))

    def to(self, device: torch.device) -> "Prior":
        """A copy on a device."""
        return Prior(*(x.to(device) for x in vars(self).values()))


def recorded_actions(trajectories: Sequence[TrajectorySource], horizon: int, space: ActionSpace = MOTION) -> Tensor:
    """The steps (N, H, D) of at most `MOST_RECORDED` windows, evenly spread over a dataset."""
    steps = []
    for trajectory in trajectories:
        last = len(trajectory) - 1
        if space.recorded(trajectory) and last >= horizon:
            steps.append(recorded_steps(trajectory, space, 0, last).unfold(0, horizon, 1).transpose(1, 2))
    every = max(1, math.ceil(sum(map(len, steps)) / MOST_RECORDED))
    return torch.cat(steps)[::every] if steps else torch.zeros(0, horizon, len(space.names))


def _ends(outside: float) -> Tensor:
    return torch.tensor([outside, 1 - outside], dtype=torch.float64)
