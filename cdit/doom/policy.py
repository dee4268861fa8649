"""A policy that explores: it walks, steers into open space, turns at varied speeds and avoids facing walls."""

import math
from dataclasses import dataclass

import numpy as np

from cdit.doom.engine import FPS, Observation

DOOR_FRAMES = 6
"""Doors take 1.8 s to rise; after 1.5 s one can see through."""
REACH = 6.0
"""Free distances beyond this many metres attract equally."""


@dataclass(frozen=True)
class Command:
    """The command for one recorded frame: the arguments of `cdit.doom.engine.Engine.step`."""

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

    speed: tuple[float, float] = (1.0, 1.8)
    """Walking speeds in m/s, redrawn every few seconds."""
    strafe: float = 0.35
    """Typical sideways speed in m/s while strafing."""
    strafe_share: float = 0.2
    """Share of the walking stretches that strafe."""
    stand_share: float = 0.08
    """Share of the stretches that stand and look around."""
    wobble: float = math.radians(18)
    """Standard deviation of the random yaw rate in rad/s while walking."""
    look_speed: tuple[float, float] = (math.radians(30), math.radians(80))
    """Yaw rates in rad/s while looking around, drawn each time."""
    evade_speed: tuple[float, float] = (math.radians(55), math.radians(90))
    """Yaw rates in rad/s of turns away from obstacles, drawn each time; fast, because walls are uninformative."""
    turn_acceleration: float = math.radians(200)
    """Bound on the change of the yaw rate in rad/s^2."""
    near: float = 1.6
    """Free distance ahead in metres below which the explorer turns away."""
    clear: float = 2.8
    """Free distance ahead in metres at which such a turn may end."""
    door_share: float = 0.0
    """Probability of trying to open an obstacle as a door: the explorer presses "use" and waits."""


@dataclass
class Stretch:
    """A stretch of frames with one goal."""

    frames: int
    """Frames left."""
    speed: float = 0.0
    """Forward speed in m/s if there is space."""
    strafe: float = 0.0
    """Speed to the left in m/s if there is space."""
    turn: float | None = None
    """Yaw rate in rad/s; None steers into open space."""
    evades: bool = False
    """Whether it continues until the way ahead is clear."""
    use: bool = False
    """Whether it begins by pressing "use"."""


class ExploringPolicy:
    """Maps observations (`horizontal_fov` in radians) to commands; depends on those so far and `rng` alone."""

    def __init__(self, horizontal_fov: float, rng: np.random.Generator, config: PolicyConfig | None = None):
        self.config = config or PolicyConfig()
        self._rng = rng
        self._half_width = math.tan(horizontal_fov / 2)
        self._stretch = Stretch(frames=0)
        self._turn = self._wobble = self._forward = 0.0
        self._last_position: np.ndarray | None = None
        self._frames_stuck = 0

    def __call__(self, seen: Observation) -> Command:
        """The command for the next frame."""
        angles, free = free_distance(seen.depth, self._half_width)
        ahead = float(free[np.abs(angles) < math.radians(16)].min())
        stretch = self._stretch = self._choose_stretch(seen.position, angles, free, ahead)
        use = stretch.use
        stretch.frames -= 1
        stretch.use = False

        room = float(np.clip((ahead - self.config.near / 2) / self.config.near, 0.0, 1.0))
        self._forward = stretch.speed * room
        self._turn = self._approach(self._wobbling_turn(angles, free) if stretch.turn is None else stretch.turn)
        return Command(self._forward, stretch.strafe * room, self._turn, use)

    def _choose_stretch(self, position: np.ndarray, angles: np.ndarray, free: np.ndarray, ahead: float) -> Stretch:
        """Continues the current stretch, or begins another."""
        now = self._stretch
        if now.frames > 0 and now.turn is not None:
            return now
        if self._is_stuck(position) or (ahead < self.config.near and not now.evades):
            return self._evasion(angles, free)
        overtime = max(0, -now.frames)
        clear = max(self.config.near, self.config.clear - 0.1 * overtime)  # in a small dead end, less must suffice
        if now.frames > 0 or (now.evades and ahead < clear):
            return now
        return self._walk()

    def _walk(self) -> Stretch:
        """A way of walking, or of standing and looking around, for the next seconds."""
        config, rng = self.config, self._rng
        if rng.random() < config.stand_share:
            return Stretch(int(rng.integers(3, 8)), turn=rng.choice([-1, 1]) * rng.uniform(*config.look_speed))
        strafe = rng.normal() * config.strafe if rng.random() < config.strafe_share else 0.0
        return Stretch(int(rng.integers(6, 24)), speed=rng.uniform(*config.speed), strafe=strafe)

    def _evasion(self, angles: np.ndarray, free: np.ndarray) -> Stretch:
        """A turn to the more open side until the way is clear, or an attempt to open a door."""
        config, rng = self.config, self._rng
        if rng.random() < config.door_share:
            return Stretch(DOOR_FRAMES, turn=0.0, use=True)
        lead = free[angles > 0].mean() - free[angles < 0].mean() + 0.5 * rng.normal()
        turn = math.copysign(rng.uniform(*config.evade_speed), lead)
        return Stretch(int(rng.integers(2, 6)), speed=rng.uniform(*config.speed), turn=turn, evades=True)

    def _is_stuck(self, position: np.ndarray) -> bool:
        """Whether it tried to walk for two frames without moving."""
        if self._last_position is not None:
            speed = float(np.linalg.norm(position - self._last_position)) * FPS
            self._frames_stuck = self._frames_stuck + 1 if speed < 0.3 * (self._forward - 0.3) else 0
        self._last_position = position
        if self._frames_stuck < 2:
            return False
        self._frames_stuck = 0
        return True

    def _wobbling_turn(self, angles: np.ndarray, free: np.ndarray) -> float:
        """The yaw rate that leads into open space, plus slow noise (an Ornstein-Uhlenbeck process)."""
        self._wobble = 0.7 * self._wobble + self.config.wobble * math.sqrt(1 - 0.7**2) * self._rng.normal()
        return 1.2 * open_direction(angles, free) + self._wobble

    def _approach(self, turn: float) -> float:
        """The next yaw rate on the way to a target rate."""
        limit, change = self.config.evade_speed[1], self.config.turn_acceleration / FPS
        return float(np.clip(np.clip(turn, -limit, limit), self._turn - change, self._turn + change))


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


def open_direction(angles: np.ndarray, free: np.ndarray) -> float:
    """The direction in radians towards open space: the mean angle, weighted by the square of the free distance.

    Each direction is limited by its neighbours, because the player has width; distances beyond `REACH` count equally.
    """
    window = max(1, len(free) // 8)
    padded = np.pad(np.minimum(free, REACH), window, mode="edge")
    passable = np.lib.stride_tricks.sliding_window_view(padded, 2 * window + 1).min(1)
    weights = passable**2
    return float((weights * angles).sum() / weights.sum())
