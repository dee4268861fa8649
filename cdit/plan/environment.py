"""Environments, which render frames and execute motions. Doom is one."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cdit.common.frames import to_float
from cdit.data.motion import local_motion
from cdit.doom.engine import FPS, Engine, Observation, camera
from cdit.doom.geometry import MapGeometry, distance_to_segments
from cdit.doom.policy import ExploringPolicy
from cdit.doom.raycast import PLAYER_RADIUS
from cdit.plan.episodes import WALK_IN, Episode
from cdit.plan.free_space import walls

TOUCH = PLAYER_RADIUS + 1 / 32
"""Metres to a wall within which the player touches it."""


@dataclass
class Seen:
    """What an agent observes after a step, and what only the evaluation knows."""

    frame: Tensor
    """(3, H, W) in [-1, 1]."""
    motion: Tensor
    """(3,) executed: dx, dy, dyaw since the last frame, in its frame; zeros at the beginning."""
    pose: np.ndarray
    """(3,) x, y, yaw in the world: for the evaluation, and for baselines that know the map."""
    contact: bool
    """Whether a wall is touched."""


class Environment(Protocol):
    """An environment for image goals."""

    def reset(self, episode: Episode) -> list[Seen]:
        """Starts an episode and returns its past frames, oldest first; the last one is the start."""

    def goal(self, episode: Episode) -> Tensor:
        """The goal image (3, H, W) in [-1, 1]."""

    def step(self, action: Tensor) -> Seen:
        """Executes the motion (3,) of one frame, as far as it is possible."""


class DoomEnvironment:
    """A map of ViZDoom. A context manager.

    Args:
        map_name: a name of `cdit.doom.maps.MAPS`.
        size: width and height of frames in pixels.
    """

    def __init__(self, map_name: str, size: int):
        self.engine, self.size = Engine(map_name, size), size
        self.geometry = MapGeometry.of(self.engine)
        self._walls = walls(self.geometry)

    def __enter__(self) -> "DoomEnvironment":
        return self

    def __exit__(self, *exception: object) -> None:
        self.engine.close()

    def reset(self, episode: Episode) -> list[Seen]:
        """See `Environment`. The explorer walks from the episode's first pose to its start."""
        walked = walk_in(self.engine, episode.seed, np.array(episode.first))
        seen = [self._seen(walked[0], walked[0])]
        seen += [self._seen(before, after) for before, after in pairwise(walked)]
        self._last = walked[-1]
        return seen

    def goal(self, episode: Episode) -> Tensor:
        """See `Environment`. Ends the running episode."""
        return _frame(self.engine.reset(episode.seed, *episode.goal))

    def step(self, action: Tensor) -> Seen:
        """See `Environment`. The speeds of the motion are reached with a lag, because of Doom's inertia."""
        dx, dy, dyaw = (float(x) * FPS for x in action)
        now = self.engine.step(dx, dy, dyaw) or self._last  # nothing moves once the map's episode has ended
        seen, self._last = self._seen(self._last, now), now
        return seen

    def simulate(self, pose: np.ndarray, actions: Tensor, moments: list[int]) -> tuple[Tensor, np.ndarray]:
        """Simulates candidates: the engine as a perfect world, except that the player starts from rest.

        Ends the running episode: use another environment.

        Args:
            pose: (3,) to start at.
            actions: (S, H, 3).
            moments: the steps after which frames are rendered.

        Returns:
            Frames (S, L, 3, H, W), and poses (S, L, 3).
        """
        frames, poses = [], []
        for candidate in actions:
            now = self.engine.reset(0, *pose)
            for t, action in enumerate(candidate[: max(moments)], 1):
                now = self.engine.step(*(float(x) * FPS for x in action)) or now
                if t in moments:
                    frames.append(_frame(now))
                    poses.append(pose_of(now))
        shape = (len(actions), len(moments))
        return torch.stack(frames).unflatten(0, shape), np.array(poses).reshape(*shape, 3)

    def _seen(self, before: Observation, now: Observation) -> Seen:
        motion = local_motion(before.position, np.array(before.yaw), now.position, np.array(now.yaw))
        contact = distance_to_segments(now.position, self._walls).min() < TOUCH
        return Seen(_frame(now), torch.from_numpy(motion).float(), pose_of(now), bool(contact))


def walk_in(engine: Engine, seed: int, first: np.ndarray) -> list[Observation]:
    """The first frames of an episode: a world needs past frames, which rarely show a player at rest."""
    seen = [engine.reset(seed, *first)]
    policy = ExploringPolicy(camera(engine.size).horizontal_fov, np.random.default_rng(seed))
    for _ in range(WALK_IN):
        command = policy(seen[-1])
        seen.append(engine.step(command.forward, command.left, command.turn) or seen[-1])
    return seen


def pose_of(seen: Observation) -> np.ndarray:
    """(3,) x, y, yaw in [-π, π)."""
    return np.array([*seen.position, (seen.yaw + math.pi) % (2 * math.pi) - math.pi])


def _frame(seen: Observation) -> Tensor:
    return to_float(torch.from_numpy(seen.frame.copy()).permute(2, 0, 1))
