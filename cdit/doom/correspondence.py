"""Where surface points of one frame appear in others, from the poses and the walls of the map."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from pathlib import Path

import numpy as np

from cdit.common.errors import DataError
from cdit.common.files import read_arrays
from cdit.data.trajectory import Trajectory
from cdit.data.windows import WindowDataset
from cdit.doom.geometry import MapGeometry
from cdit.doom.raycast import Surface, View, cast, standing_height

TOLERANCE = 0.05
"""A point is occluded if the ray towards it ends more than this many metres before it."""


class Sight(IntEnum):
    """How a past frame shows the point that a target patch shows."""

    UNKNOWN = 0
    """No static surface point: sky, the void, moving surfaces, behind a grating; or the past frame does not exist."""
    OUTSIDE = 1
    """Behind the camera, or outside its frame."""
    HIDDEN = 2
    """Within the frame, but occluded."""
    VISIBLE = 3


@dataclass(frozen=True)
class Correspondence:
    """For N target patches and T past frames, with any leading dimensions."""

    place: np.ndarray
    """(…, N, T, 2) float64: row and column in the past frame in patches, where patch (r, c) is [r, r+1) × [c, c+1);
    NaN unless visible or occluded."""
    sight: np.ndarray
    """(…, N, T) int8 of `Sight`."""
    surface: np.ndarray
    """(…, N) int8 of `cdit.doom.raycast.Surface`: what is at the centre of the target patch."""
    uncertain: np.ndarray
    """(…, N) bool: part of a door, a lift or the like, or behind a grating."""
    point: np.ndarray
    """(…, N, 3) float64: its position in metres; NaN in the void."""
    depth: np.ndarray
    """(…, N, T) float64: its depth along the optical axis of the past frame in metres, negative behind the camera."""

    @property
    def visible(self) -> np.ndarray:
        """(…, N, T) bool: the past frame shows the same static surface point."""
        return self.sight == Sight.VISIBLE


def correspondences(
    geometry: MapGeometry,
    view: View,
    target: np.ndarray,
    target_yaw: np.ndarray,
    past: np.ndarray,
    past_yaw: np.ndarray,
) -> Correspondence:
    """Casts a ray through the centre of each target patch, and locates the surface point it hits in the past frames.

    Args:
        geometry: the map.
        view: of all frames.
        target: (…, 3) eye of the target's camera in metres.
        target_yaw: (…,) its heading in radians.
        past: (…, T, 3) eyes of the past frames; NaN if a frame does not exist.
        past_yaw: (…, T) their headings.
    """
    rays = view.centre_rays(target_yaw)
    hits = cast(geometry, np.broadcast_to(target[..., None, :], rays.shape).reshape(-1, 3), rays.reshape(-1, 3))
    shape = rays.shape[:-1]
    surface, uncertain = hits.surface.reshape(shape), hits.uncertain.reshape(shape)
    point = hits.point.reshape(*shape, 3)
    known = np.isin(surface, (Surface.WALL, Surface.FLOOR, Surface.CEILING)) & ~uncertain

    offset = point[..., None, :] - past[..., None, :, :]  # (…, N, T, 3)
    place, depth = view.project(offset, past_yaw[..., None, :])
    known = known[..., None] & np.isfinite(depth)
    inside = known & view.contains(place)
    sight = np.where(known, np.where(inside, Sight.HIDDEN, Sight.OUTSIDE), Sight.UNKNOWN).astype(np.int8)
    origin = np.broadcast_to(past[..., None, :, :], offset.shape)[inside]
    length = np.linalg.norm(offset[inside], axis=-1)
    back = cast(geometry, origin, offset[inside] / length[:, None])
    reached = back.distance > length - TOLERANCE
    sight[inside] = np.select([reached & ~back.uncertain, ~reached], [Sight.VISIBLE, Sight.HIDDEN], Sight.UNKNOWN)
    place[sight < Sight.HIDDEN] = np.nan
    return Correspondence(place, sight, surface, uncertain, point, depth)


class WindowCorrespondence:
    """The correspondences of goal frames with the context frames of windows of a dataset recorded in Doom.

    Raises:
        DataError: the dataset's camera or the map of a trajectory is unknown.
    """

    def __init__(self, dataset: WindowDataset, grid: tuple[int, int]):
        if dataset.info.camera is None:
            folders = ", ".join(source.folder for source in dataset.config.sources)
            raise DataError(f"{folders}: dataset.json has no camera (or cameras differ), so true places are unknown")
        for trajectory in dataset.trajectories:
            map_file(trajectory)
        self.dataset = dataset
        self.view = View.of(dataset.info.camera, dataset.config.image_size, dataset.config.crop, grid)

    def __call__(self, window: int, offset: int) -> Correspondence:
        """Of the frame `offset` after the window's current one with its T context frames, oldest first.

        Raises:
            IndexError: the offset leads out of the trajectory.
        """
        index, now = self.dataset.locate(window)
        trajectory = self.dataset.trajectories[index]
        goal = now + offset
        if not 0 <= goal < len(trajectory):
            raise IndexError(f"{trajectory.name} has frames 0 to {len(trajectory) - 1}, but {goal} was requested")
        times = np.arange(now - self.dataset.config.context_frames + 1, now + 1)
        geometry = _geometry(map_file(trajectory))
        eyes, yaw = self._eyes(trajectory, geometry, [goal, *times.clip(min=0)])
        eyes[1:][times < 0] = np.nan
        return correspondences(geometry, self.view, eyes[0], yaw[0], eyes[1:], yaw[1:])

    def _eyes(
        self, trajectory: Trajectory, geometry: MapGeometry, times: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(P, 3) eyes and (P,) headings at `times`; without recorded heights, those of a standing player."""
        position, recorded = trajectory.position[times], _eye_heights(trajectory.folder / "eye.npz")
        if recorded is None:
            height = standing_height(geometry, position) + self.dataset.info.camera.eye_height
        else:
            height = recorded[times]
        return np.concatenate([position, height[:, None]], axis=1), trajectory.yaw[times]


def map_file(trajectory: Trajectory) -> Path:
    """The geometry file of the map that a trajectory was recorded on.

    Raises:
        DataError: it does not exist: the dataset is not from Doom.
    """
    map_name, _, number = trajectory.name.rpartition("_")
    path = trajectory.dataset / "maps" / f"{map_name}.npz"
    if not (number.isdigit() and path.is_file()):
        raise DataError(
            f"{trajectory.folder}: no walls of its map in {trajectory.dataset / 'maps'}, where data/doom/prepare.py "
            "writes them; true places are known only in datasets from Doom"
        )
    return path


_geometry = lru_cache(maxsize=8)(MapGeometry.load)


@lru_cache(maxsize=64)
def _eye_heights(path: Path) -> np.ndarray | None:
    """(T,) metres; None if the file does not exist, as in older datasets."""
    if not path.is_file():
        return None
    arrays = list(read_arrays(path).values())
    if len(arrays) != 1 or arrays[0].ndim != 1 or arrays[0].dtype.kind != "f":
        raise DataError(f"{path}: expected one array of heights (T,)")
    return arrays[0]
