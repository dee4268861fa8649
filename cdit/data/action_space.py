"""What the numbers of an action mean: by default the motion of the camera, or any named numbers. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np

from cdit.common.limits import Distinct, Limit
from cdit.data.motion import compose, local_motion

if TYPE_CHECKING:
    from cdit.data.source import TrajectorySource

ActionKind = Literal["absolute", "relative", "sum"]
"""How the action between two frames is computed from the numbers of every frame (see `ActionSpace.kind`)."""
MAX_NUMBER = 1e9
"""Largest number of an action, so that sums and squares are finite in float32."""


@dataclass
class ActionSpace:
    """K named numbers."""

    names: Annotated[Distinct[list[str]], Limit("at most 64 names", lambda x: len(x) <= 64)] = field(
        default_factory=lambda: ["dx", "dy", "dyaw"]
    )
    units: list[str] = field(default_factory=lambda: ["m", "m", "rad"])
    """Of each number; empty if unknown."""
    low: list[float] = field(default_factory=list)
    """Smallest recorded value of each number; none for motion, whose unit is the dataset's spacing."""
    high: list[float] = field(default_factory=list)
    """Largest recorded value."""
    kind: Literal["motion", "absolute", "relative", "sum"] = "motion"
    """How the action between two frames is defined. motion: the motion of the camera, computed from poses. Otherwise it
    is computed from numbers recorded at every frame, which lead to the next one: those that led to the goal (absolute),
    their difference from those that led to the start (relative), or their sum over the interval (sum)."""

    def problem(self) -> str | None:
        """A description of what is wrong with the values of a file, or None."""
        if len(self.units) != len(self.names):
            return f"units: expected {len(self.names)}, one for each name"
        count = 0 if self.kind == "motion" else len(self.names)
        if len(self.low) != count or len(self.high) != count:
            return f"low, high: expected {count} numbers each"
        if not all(-MAX_NUMBER <= a <= b <= MAX_NUMBER for a, b in zip(self.low, self.high, strict=True)):
            return f"low, high: expected finite numbers up to {MAX_NUMBER:g}, in order"
        if self.kind == "motion" and self.names != ActionSpace().names:
            return f"names: expected {', '.join(ActionSpace().names)} for motion"
        return None

    def recorded(self, trajectory: "TrajectorySource") -> bool:
        """Whether a trajectory has the data that actions are computed from."""
        return (trajectory.position if self.kind == "motion" else trajectory.actions) is not None

    def between(
        self, trajectory: "TrajectorySource", origins: Sequence[int] | np.ndarray, goals: Sequence[int] | np.ndarray
    ) -> np.ndarray:
        """The actions (G, K) from frames `origins` (G,) to frames `goals` (G,), which may lie before them, in float64.

        Before frame 0, where nothing is recorded, the numbers of frame 0 count as those that led to it.
        """
        origins, goals = np.asarray(origins, np.int64), np.asarray(goals, np.int64)
        if self.kind == "motion":
            position, yaw = trajectory.position, trajectory.yaw
            return local_motion(position[origins], yaw[origins], position[goals], yaw[goals])
        actions = np.asarray(trajectory.actions, np.float64)
        if self.kind == "sum":
            total = np.concatenate((np.zeros_like(actions[:1]), actions.cumsum(axis=0)))
            return total[goals] - total[origins]
        led = actions[np.maximum(goals - 1, 0)]
        return led if self.kind == "absolute" else led - actions[np.maximum(origins - 1, 0)]

    def compose(self, steps: np.ndarray) -> np.ndarray:
        """Actions (L, K) of consecutive steps to those from the start to the end of each step, (L, K) float32."""
        if self.kind == "motion":
            return compose(steps)
        return (steps if self.kind == "absolute" else np.cumsum(steps, axis=0, dtype=np.float64)).astype(np.float32)

    def normalization(self, farthest: int) -> tuple[list[float], list[float]]:
        """Scale and offset of each number, for actions of about -1 to 1 over up to `farthest` frames.

        Motion has spacings as its unit.
        """
        if self.kind == "motion":
            return [1 / farthest, 1 / farthest, 1 / np.pi], [0.0] * 3
        low, high = np.array(self.low), np.array(self.high)
        width = np.where(high > low, high - low, 1.0)
        if self.kind == "absolute":
            return (2 / width).tolist(), (-(low + high) / width).tolist()
        if self.kind == "relative":
            return (1 / width).tolist(), [0.0] * len(low)
        largest = np.maximum(np.abs(low), np.abs(high))
        return (1 / (farthest * np.where(largest > 0, largest, 1.0))).tolist(), [0.0] * len(low)
