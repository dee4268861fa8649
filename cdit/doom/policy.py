"""A policy that explores: it walks on, steers into the open, turns at varied speeds and does not stare at walls."""

import math
from dataclasses import dataclass

import numpy as np

from cdit.doom.engine import FPS, Observation


@dataclass(frozen=True)
class Command:
    """What to do for one recorded frame; the arguments of `cdit.doom.engine.Engine.step`."""

    forward: float
    """m/s."""
    left: float
    """m/s."""
    turn: float
    """rad/s, counter-clockwise."""
    use: bool = False
    """Press "use", which opens doors."""


@dataclass(frozen=True)
class PolicyConfig:
    """How the explorer walks."""

    speed: tuple[float, float] = (0.9, 1.8)
    """Walking speeds in m/s, drawn anew every few seconds."""
    strafe: float = 0.35
    """Typical sideways speed in m/s while strafing."""
    strafe_share: float = 0.2
    """Share of the walking stretches that strafe."""
    stand_share: float = 0.08
    """Share of the stretches that stand and look around."""
    wobble: float = math.radians(18)
    """Standard deviation of the random yaw rate in rad/s while walking."""
    turn_speed: tuple[float, float] = (math.radians(35), math.radians(90))
    """Yaw rates of deliberate turns in rad/s, drawn per turn."""
    turn_acceleration: float = math.radians(200)
    """Bound on the change of the yaw rate in rad/s^2."""
    near: float = 1.3
    """Free distance ahead in metres below which the explorer turns away."""
    clear: float = 2.6
    """Free distance ahead in metres at which such a turn may end."""
    use_share: float = 0.3
    """Chance to press "use" when something is in the way: it may be a door."""


class ExploringPolicy:
    """Maps observations to commands; depends on the observations so far and `rng` alone.

    Args:
        horizontal_fov: field of view of the observations in radians.
        rng: source of all choices.
        config: how to walk.
    """

    def __init__(self, horizontal_fov: float, rng: np.random.Generator, config: PolicyConfig | None = None):
        self.config = config or PolicyConfig()
        self.rng = rng
        self.half_width = math.tan(horizontal_fov / 2)
        self.turn = self.wobble = 0.0
        self.frames_left = 0
        self.escape: float | None = None
        self.escape_frames = 0
        self.last_position: np.ndarray | None = None
        self.blocked_frames = 0
        self.wanted_forward = 0.0

    def __call__(self, seen: Observation) -> Command:
        """The command for the next frame."""
        config, rng = self.config, self.rng
        angles, free = free_distance(seen.depth, self.half_width)
        ahead = free[np.abs(angles) < math.radians(16)].min()
        if self.frames_left <= 0:
            self._begin_stretch()
        self.frames_left -= 1
        use = False
        if self._is_stuck(seen.position) or (self.escape is None and ahead < config.near):
            use = self._begin_escape(angles, free)
        elif self.escape is not None:
            self.escape_frames -= 1
            if self.escape_frames <= 0 and ahead > config.clear:
                self.escape = None

        self.wobble += -0.3 * self.wobble + config.wobble * math.sqrt(1 - 0.7**2) * rng.normal()
        if self.escape is not None:
            wanted_turn = self.escape
        elif self.speed == 0:
            wanted_turn = self.look_around
        else:
            wanted_turn = 1.2 * open_direction(angles, free, self.reach) + self.wobble
        limit = config.turn_speed[1]
        change = config.turn_acceleration / FPS
        self.turn += float(np.clip(np.clip(wanted_turn, -limit, limit) - self.turn, -change, change))
        room = float(np.clip((ahead - 0.5 * config.near) / config.near, 0.0, 1.0))
        self.wanted_forward = self.speed * room
        return Command(self.wanted_forward, self.strafe * room, self.turn, use)

    def _begin_stretch(self) -> None:
        """Draws a way of walking for the next seconds."""
        config, rng = self.config, self.rng
        stands = rng.random() < config.stand_share
        self.frames_left = int(rng.integers(3, 8) if stands else rng.integers(6, 24))
        self.speed = 0.0 if stands else rng.uniform(*config.speed)
        self.strafe = rng.normal() * config.strafe if not stands and rng.random() < config.strafe_share else 0.0
        self.look_around = rng.choice([-1, 1]) * rng.uniform(*config.turn_speed)
        self.reach = rng.uniform(2.0, 8.0)

    def _begin_escape(self, angles: np.ndarray, free: np.ndarray) -> bool:
        """Starts a turn to the more open side; returns whether to try whether it is a door."""
        config, rng = self.config, self.rng
        lead = free[angles > 0].mean() - free[angles < 0].mean()
        side = math.copysign(1.0, lead + rng.normal() * 0.5)
        self.escape = side * rng.uniform(*config.turn_speed)
        self.escape_frames = int(rng.integers(2, 6))
        if self.speed == 0:
            self.frames_left = 0
        return bool(rng.random() < config.use_share)

    def _is_stuck(self, position: np.ndarray) -> bool:
        """Whether it has wanted to walk for several frames and got nowhere."""
        if self.last_position is not None:
            moved = float(np.linalg.norm(position - self.last_position))
            self.blocked_frames = self.blocked_frames + 1 if moved < 0.3 * self.wanted_forward / FPS else 0
        self.last_position = position
        stuck = self.blocked_frames >= 2
        if stuck:
            self.blocked_frames = 0
        return stuck


def free_distance(depth: np.ndarray, half_width: float) -> tuple[np.ndarray, np.ndarray]:
    """How far one can see at eye height, per direction.

    Args:
        depth: (H, W) distance along the optical axis in metres.
        half_width: tangent of half the horizontal field of view.

    Returns:
        (W,) angles in radians, counter-clockwise, from left (positive) to right; (W,) distances in metres.
    """
    height, width = depth.shape
    tangents = half_width * (1 - (2 * np.arange(width) + 1) / width)
    band = depth[int(0.4 * height) : int(0.55 * height) + 1]
    return np.arctan(tangents), band.min(0) * np.sqrt(1 + tangents**2)


def open_direction(angles: np.ndarray, free: np.ndarray, reach: float) -> float:
    """The direction in radians towards the open: the mean angle, weighted by the square of the free distance.

    Distances beyond `reach` metres count as `reach`, and each direction as its neighbours allow, for one has width.
    """
    window = max(1, len(free) // 8)
    padded = np.pad(np.minimum(free, reach), window, mode="edge")
    passable = np.lib.stride_tricks.sliding_window_view(padded, 2 * window + 1).min(1)
    weights = passable**2
    return float((weights * angles).sum() / weights.sum())
