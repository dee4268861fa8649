"""The protocols: which frames are predicted, with which actions.

They follow Navigation World Models (arXiv 2412.03572): *time* predicts 1, 2, 4, 8 and 16 s ahead in one jump, *rollout*
autoregressively at 1 and 4 frames per second.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from cdit.batch import Batch, Condition
from cdit.common.errors import UserError
from cdit.common.frames import to_float
from cdit.data.action_space import ActionSpace
from cdit.data.motion import wrap_angle
from cdit.data.source import TrajectorySource
from cdit.data.windows import WindowDataset
from cdit.diffusion import SamplerConfig
from cdit.evaluate.cases import Case
from cdit.world_model import Units, WorldModel


@dataclass(frozen=True)
class Protocol(ABC):
    """Which frames are predicted from each context, and which of them are measured."""

    name: str
    seconds: list[float]
    """The horizons that are measured."""
    fps: float
    """The model's frames per second."""
    offsets: list[int]
    """How many frames ahead each of the G predicted frames is."""
    shown: list[float] = field(default_factory=list, kw_only=True)
    """The horizons in tables and pictures; by default all."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shown", list(self.shown or self.seconds))

    @property
    def reach(self) -> int:
        """How many frames after the current one the protocol needs."""
        return max(self.offsets)

    @property
    def measured(self) -> list[int]:
        """Indices of the horizons in `offsets`."""
        return self.indices(self.seconds)

    def indices(self, seconds: Sequence[float]) -> list[int]:
        """Indices of horizons in `offsets`."""
        return [self.offsets.index(round(second * self.fps)) for second in seconds]

    @abstractmethod
    def actions(self, space: ActionSpace, trajectory: TrajectorySource, now: int) -> np.ndarray:
        """The actions that the model is conditioned on, (G, K)."""

    @abstractmethod
    def predict(
        self,
        world: WorldModel,
        batch: Batch,
        sampler: SamplerConfig | None,
        noise: torch.Generator,
        latents: bool = False,
    ) -> Tensor:
        """Frames (B, G, 3, H, W) in [-1, 1] for the goals of a batch, or their latents (B, G, C, h, w)."""

    def motion(self, dataset: WindowDataset, case: Case) -> Condition:
        """The case's actions (G, K), and whether they are known (G,)."""
        trajectory, space = dataset.trajectories[case.trajectory], dataset.info.actions
        known = space.recorded(trajectory)
        action = np.zeros((len(self.offsets), len(space.names)))
        if known:
            action = self.actions(space, trajectory, case.now)
        return Condition(action=torch.tensor(action, dtype=torch.float32), known=torch.full((len(action),), known))

    def window(self, dataset: WindowDataset, case: Case) -> Batch:
        """The case's window with its targets at `offsets` and this protocol's actions."""
        window = dataset.window(case.window, self.offsets)
        return moved(window, self.motion(dataset, case))


@dataclass(frozen=True)
class Direct(Protocol):
    """Each horizon in one jump, given the action from the last context frame, as in training."""

    def actions(self, space: ActionSpace, trajectory: TrajectorySource, now: int) -> np.ndarray:
        """From the current frame to each goal."""
        return space.between(trajectory, np.array(now), now + np.array(self.offsets))

    def predict(
        self,
        world: WorldModel,
        batch: Batch,
        sampler: SamplerConfig | None,
        noise: torch.Generator,
        latents: bool = False,
    ) -> Tensor:
        """All goals of a context at once."""
        return world.predict(
            to_float(batch.context),
            batch.condition,
            mask=batch.mask,
            sampler=sampler,
            generator=noise,
            latents=latents,
        )


@dataclass(frozen=True)
class Rollout(Protocol):
    """Frame by frame, each prediction joining the past frames."""

    stride: int = 1
    """Frames of the model in one step."""
    release: tuple[Units, float] | None = None
    """Units and spacing in metres for rollouts by the conventions of the NWM release: its actions (see
    `release_actions`), and predictions that join the past as frames, encoded again."""

    def actions(self, space: ActionSpace, trajectory: TrajectorySource, now: int) -> np.ndarray:
        """Of each step."""
        times = now + np.array([0, *self.offsets])
        if self.release:
            return release_actions(space.between(trajectory, np.array(now), times[1:]), *self.release)
        return space.between(trajectory, times[:-1], times[1:])

    def predict(
        self,
        world: WorldModel,
        batch: Batch,
        sampler: SamplerConfig | None,
        noise: torch.Generator,
        latents: bool = False,
    ) -> Tensor:
        """All steps, one after the other."""
        return world.rollout(
            to_float(batch.context),
            replace(batch.condition, time_shift=None).map_goals(lambda x: x[:, None]),
            mask=batch.mask,
            fps=self.fps / self.stride,
            sampler=sampler,
            generator=noise,
            reencode=self.release is not None,
            latents=latents,
        )[:, 0]


def direct(seconds: Sequence[float], fps: float) -> Direct:
    """The protocol *time*.

    Raises:
        UserError: a horizon lies between two frames.
    """
    offsets = [_frames(horizon, fps, "time.seconds") for horizon in seconds]
    return Direct("time", list(seconds), fps, offsets)


def rollout(
    seconds: Sequence[float],
    rate: float,
    fps: float,
    release: tuple[Units, float] | None = None,
    every_second: bool = False,
) -> Rollout:
    """The protocol *rollout* at a rate in frames per second, up to the last of the horizons.

    With `every_second` all whole seconds are measured, too.

    Raises:
        UserError: the rate does not divide the model's, or a horizon lies between two steps.
    """
    stride = round(fps / rate)
    if stride < 1 or abs(stride * rate - fps) > 1e-6:
        raise UserError(f"rollout.fps is {rate:g}, expected a divisor of the model's {fps:g} frames per second")
    steps = max(_frames(horizon, rate, "rollout.seconds") for horizon in seconds)
    offsets = [stride * step for step in range(1, steps + 1)]
    measured = whole_seconds(seconds, rate) if every_second else list(seconds)
    return Rollout(f"rollout_{rate:g}fps", measured, fps, offsets, stride, release, shown=list(seconds))


def whole_seconds(seconds: Sequence[float], rate: float) -> list[float]:
    """The horizons, and every whole second up to the last of them that a step at that rate ends at."""
    whole = (float(second) for second in range(1, int(max(seconds)) + 1))
    return sorted({*seconds, *(second for second in whole if abs(second * rate - round(second * rate)) < 1e-6)})


def moved(batch: Batch, motion: Condition) -> Batch:
    """A batch, or a sample, with the actions of `motion`."""
    return replace(batch, condition=replace(batch.condition, action=motion.action, known=motion.known))


def release_actions(waypoints: np.ndarray, units: Units, spacing: float) -> np.ndarray:
    """Actions of a rollout that `Units.normalize` turns into the NWM release's, which differ from its training's.

    The release normalises the way points as positions in the frame at the start, and then takes their differences. So
    the offset of the normalisation is in the first step alone, and later steps are not turned into their new heading.

    Args:
        waypoints: (L, 3) poses after each step (metres and radians) in the frame at the start.
        units: of the model.
        spacing: metres, for units that have none of their own.

    Returns:
        (L, 3), float64.
    """
    steps = np.diff(waypoints, axis=0, prepend=np.zeros((1, 3)))
    steps[:, 2] = wrap_angle(steps[:, 2])
    unit = np.array([units.spacing or spacing] * 2 + [1.0])
    steps[1:] -= np.array(units.action_offset) / np.array(units.action_scale) * unit
    return steps


def _frames(seconds: float, fps: float, field: str) -> int:
    frames = round(seconds * fps)
    if frames < 1 or abs(frames - seconds * fps) > 1e-6:
        raise UserError(f"{field}: {seconds:g} s is not a positive whole number of frames at {fps:g} frames per second")
    return frames
