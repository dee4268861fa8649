"""The truth beside the dream: the same commands move the player in the engine, and the resulting camera motion is the
dream's action.

In the engine, players have inertia and are stopped by walls, so the action of a step is the measured motion, as in
recorded datasets.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cdit.common.errors import UserError
from cdit.data.frames import crop_and_resize
from cdit.data.layout import DatasetInfo
from cdit.data.motion import local_motion
from cdit.doom.engine import FPS, Engine, Observation, engine_version
from cdit.doom.geometry import MapGeometry
from cdit.doom.maps import MAPS, file_name
from cdit.world_model import WorldDescription

RECIPE = "data/doom/prepare.py"


@dataclass(frozen=True)
class Place:
    """Where a walk in the engine begins."""

    map_name: str
    position: tuple[float, float] | None = None
    """Metres; a random place if unknown."""
    yaw: float = 0.0
    """Radians."""


class Truth:
    """A walk through the engine, whose process ends with `close`.

    Args:
        place: where it begins.
        size: side in pixels of the engine's frames.
        world: gives the size of the frames for the model.
        seed: of the random place, and of the engine.

    Raises:
        UserError: ViZDoom is not installed, or there is no such map.
    """

    def __init__(self, place: Place, size: int, world: WorldDescription, seed: int = 0):
        self.map_name, self._world, self._seed = place.map_name, world, seed
        self._engine = Engine(place.map_name, size)
        if place.position is None:
            rng = np.random.default_rng(seed)
            x, y = MapGeometry.of(self._engine).random_free_point(rng)
            place = Place(place.map_name, (float(x), float(y)), float(rng.uniform(0, 2 * np.pi)))
        self.walk: list[Observation] = [self._stand(*place.position, place.yaw)]
        self._is_placed = True

    def close(self) -> None:
        """Ends the engine's process."""
        self._engine.close()

    @property
    def frame(self) -> Tensor:
        """What the camera sees, as the model would: (3, H, W) uint8."""
        picture = torch.from_numpy(self.walk[-1].frame.transpose(2, 0, 1).copy())
        return crop_and_resize(picture, tuple(self._world.image_size), self._world.crop)

    def step(self, forward: float, left: float, turn: float) -> tuple[float, float, float] | None:
        """Walks for one frame with these commands, in m/s and rad/s.

        Returns:
            The motion dx, dy, dyaw that resulted; None if the walk has ended at an exit of the map.
        """
        before = self.walk[-1]
        if not self._is_placed:
            self._stand(*before.position, before.yaw)
            self._is_placed = True
        after = self._engine.step(forward, left, turn)
        if after is None:
            self._is_placed = False
            return None
        self.walk.append(after)
        motion = local_motion(before.position, np.float64(before.yaw), after.position, np.float64(after.yaw))
        return tuple(motion.tolist())

    def back(self) -> None:
        """Undoes the last step; the player then stands still there."""
        if len(self.walk) > 1:
            self.walk.pop()
            self._is_placed = False

    def _stand(self, x: float, y: float, yaw: float) -> Observation:
        return self._engine.reset(self._seed, float(x), float(y), float(yaw))


def truth_of(info: DatasetInfo | None, world: WorldDescription) -> list[str]:
    """The maps in which the truth can be walked.

    Raises:
        UserError: there is no engine for this dataset; the message says why.
    """
    if info is None or info.source.get("recipe") != RECIPE:
        raise UserError("the start frames are not from a dataset that was recorded in Doom")
    engine_version()
    if world.fps != FPS:
        raise UserError(f"the engine was recorded at {FPS} frames per second, the model has {world.fps:g}")
    known = [*info.source.get("maps", ()), *info.source.get("unknown_maps", ())]
    return [name for name in known if name in MAPS]


def map_of(trajectory: str, maps: list[str]) -> str | None:
    """The map that a recorded trajectory is from, by its name."""
    return next((name for name in maps if trajectory.startswith(f"{file_name(name)}_")), None)
