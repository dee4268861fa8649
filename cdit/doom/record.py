"""Recording of one trajectory: where to start, when to stop, what to keep."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cdit.common.errors import UserError
from cdit.doom.engine import FPS, Engine, Observation, camera
from cdit.doom.geometry import MapGeometry
from cdit.doom.policy import ExploringPolicy, PolicyConfig

MAX_STEP = 3.0 / FPS
"""Moving farther than this between two frames, in metres, means a teleport."""
MAX_TURN_ERROR = math.radians(3)
"""A heading that differs by more than this from the commanded turn, in radians, means a teleport."""
STILL_FRAMES, STILL_RADIUS = 40, 1.0
"""Staying within this many metres for this many frames means being stuck."""
VOID_DEPTH, VOID_SHARE = 20.0, 0.25
"""If this share of the lowest quarter of the picture is deeper than this many metres, the camera is outside the map."""
DOOR_SHARE = 0.2
"""The policy's `door_share` on maps with doors."""
ATTEMPTS = 200


@dataclass(frozen=True)
class Recording:
    """One uninterrupted walk of T frames."""

    frames: np.ndarray
    """(T, size, size, 3) uint8 RGB."""
    position: np.ndarray
    """(T, 2) float64 metres."""
    yaw: np.ndarray
    """(T,) float64 radians, unwrapped."""
    eye: np.ndarray
    """(T,) float64 metres: height of the camera."""
    depth: np.ndarray
    """(T, size, size) float16 metres."""


def record(
    engine: Engine,
    geometry: MapGeometry,
    rng: np.random.Generator,
    length: int,
    min_length: int,
    tick: Callable[[], None] = lambda: None,
) -> Recording:
    """Walks from a random place for `length` frames, or until a teleport, death, the map's exit, its edge, or stuck.

    Walks shorter than `min_length` frames are discarded, and another place is tried.

    Args:
        rng: source of all randomness; the result depends only on it, the map and the lengths.
        length: requested number of frames.
        min_length: required number of frames.
        tick: called before every frame; an exception that it raises ends the recording.

    Raises:
        UserError: no place in the map allows a walk of `min_length` frames.
    """
    for _ in range(ATTEMPTS):
        seen = _walk(engine, geometry, rng, length, tick)
        if len(seen) >= min_length:
            return Recording(
                frames=np.stack([s.frame for s in seen]),
                position=np.stack([s.position for s in seen]),
                yaw=np.unwrap([s.yaw for s in seen]),
                eye=np.array([s.eye for s in seen]),
                depth=np.stack([s.depth for s in seen]).astype(np.float16),
            )
    raise UserError(f"{engine.map_name}: no walk of min_length ({min_length}) frames in {ATTEMPTS} attempts")


def _walk(
    engine: Engine, geometry: MapGeometry, rng: np.random.Generator, length: int, tick: Callable[[], None]
) -> list[Observation]:
    x, y = geometry.random_free_point(rng)
    seen = [engine.reset(int(rng.integers(2**31)), x, y, rng.uniform(0, 2 * math.pi))]
    config = PolicyConfig(door_share=DOOR_SHARE if geometry.has_doors else 0.0)
    policy = ExploringPolicy(camera(engine.size).horizontal_fov, rng, config)
    while len(seen) < length:
        tick()
        command = policy(seen[-1])
        after = engine.step(command.forward, command.left, command.turn, command.use)
        if after is None or is_discontinuous(seen[-1], after, command.turn) or sees_void(after):
            break
        seen.append(after)
        if is_still(seen):
            return seen[:-STILL_FRAMES]
    return seen


def is_discontinuous(before: Observation, after: Observation, turn: float) -> bool:
    """Whether the camera was moved by anything other than walking at a yaw rate of `turn` rad/s."""
    tic_error = abs(turn) / FPS / 8
    yaw_error = math.remainder(after.yaw - before.yaw - turn / FPS, 2 * math.pi)
    moved = np.linalg.norm(after.position - before.position)
    return bool(moved > MAX_STEP or abs(yaw_error) > MAX_TURN_ERROR + tic_error)


def sees_void(seen: Observation) -> bool:
    """Whether there is sky where the floor should be: the camera is outside the map."""
    return bool((seen.depth[-len(seen.depth) // 4 :] > VOID_DEPTH).mean() > VOID_SHARE)


def is_still(seen: list[Observation]) -> bool:
    """Whether the last frames are all from about the same position."""
    if len(seen) <= STILL_FRAMES:
        return False
    recent = np.stack([s.position for s in seen[-STILL_FRAMES:]])
    return bool(np.linalg.norm(recent - recent[-1], axis=1).max() < STILL_RADIUS)
