"""Ray casting in a map: which wall, floor or ceiling a camera sees, where, and at what distance.

Doom's maps are prisms: sectors with a flat floor and a flat ceiling, bordered by vertical lines. So a ray is followed
in the plane, from line to line. If it reaches a line below the floor of the sector before it, it has hit that floor; if
above its ceiling, the ceiling. Otherwise it hits the line's lower wall if it is below the floor behind, the upper wall
if above the ceiling behind, and continues if neither. Each line is tested independently; the nearest one that stops the
ray is what the camera sees.

`MapGeometry` does not contain things (lamps, barrels, trees), the holes of gratings, fences and vines, or movements of
doors and lifts since the start of the map. Rays that involve the last two are marked (`Hits.uncertain`), except for
views through an open door, which is closed in the geometry.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from cdit.common.errors import UserError
from cdit.data.frames import Crop, focal_lengths
from cdit.data.layout import Camera
from cdit.doom.engine import HEIGHT_UNITS_PER_METRE, UNITS_PER_METRE
from cdit.doom.geometry import MapGeometry

PLAYER_RADIUS = 16 / UNITS_PER_METRE
STEP_HEIGHT = 24 / HEIGHT_UNITS_PER_METRE
"""The highest step that a player can climb."""
PAIRS_AT_A_TIME = 2**22
"""Rays times lines per chunk: 32 MB for each of two arrays."""


class Surface(IntEnum):
    """What a ray hits."""

    NOTHING = 0
    """The void: the ray leaves the map."""
    WALL = 1
    FLOOR = 2
    CEILING = 3
    SKY = 4
    """Open sky; its distance is that of the map's boundary there, and its points do not count as surfaces."""


@dataclass(frozen=True)
class Hits:
    """The first hits of R rays."""

    surface: np.ndarray
    """(R,) int8 of `Surface`."""
    distance: np.ndarray
    """(R,) float64: in multiples of the direction's length, metres for unit directions; inf for NOTHING."""
    point: np.ndarray
    """(R, 3) float64: x, y, z in metres; NaN for NOTHING."""
    sector: np.ndarray
    """(R,) int64: the sector in which the ray ends; -1 for NOTHING."""
    uncertain: np.ndarray
    """(R,) bool: the surface may have moved since the start of the map, or a grating is in front of it."""


@dataclass(frozen=True)
class View:
    """The projection of a frame: a pinhole camera with a horizontal axis, and a grid of patches."""

    half_width: float
    """Tangent of half the horizontal field of view."""
    half_height: float
    """Tangent of half the vertical field of view."""
    rows: int
    columns: int

    @classmethod
    def of(cls, camera: Camera, image_size: tuple[int, int], crop: Crop, grid: tuple[int, int]) -> "View":
        """The view of frames after `crop_and_resize`.

        Raises:
            UserError: the camera's pitch is not 0.
        """
        if camera.pitch != 0:
            raise UserError(f"dataset.json: camera.pitch is {camera.pitch}, expected 0, as Doom's cameras have")
        horizontal, vertical = focal_lengths(camera, image_size, crop)
        return cls(image_size[1] / 2 / horizontal, image_size[0] / 2 / vertical, *grid)

    def centre_rays(self, yaw: np.ndarray) -> np.ndarray:
        """Directions through the centres of the patches, row by row, for cameras (…,) at `yaw`: (…, N, 3).

        Their part along the optical axis is 1, so that distances along them are depths.
        """
        up = self.half_height * (1 - 2 * (np.arange(self.rows) + 0.5) / self.rows)
        left = self.half_width * (1 - 2 * (np.arange(self.columns) + 0.5) / self.columns)
        up, left = (grid.ravel() for grid in np.meshgrid(up, left, indexing="ij"))
        cos, sin = np.cos(yaw)[..., None], np.sin(yaw)[..., None]
        return np.stack(np.broadcast_arrays(cos - left * sin, sin + left * cos, up), axis=-1)

    def project(self, offset: np.ndarray, yaw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Projects points into the frame of a camera.

        Args:
            offset: (…, 3) from the eye to the points, in metres along the axes of the world.
            yaw: (…,) of the cameras.

        Returns:
            Row and column in patches, (…, 2), with patch (r, c) from r to r + 1 and c to c + 1, NaN for points behind
            the camera; and the depth along the optical axis in metres, (…,).
        """
        cos, sin = np.cos(yaw), np.sin(yaw)
        depth = offset[..., 0] * cos + offset[..., 1] * sin
        left = offset[..., 1] * cos - offset[..., 0] * sin
        scale = np.where(depth > 0, depth, np.nan)
        row = (1 - offset[..., 2] / scale / self.half_height) / 2 * self.rows
        column = (1 - left / scale / self.half_width) / 2 * self.columns
        return np.stack((row, column), axis=-1), depth

    def contains(self, place: np.ndarray) -> np.ndarray:
        """Whether rows and columns (…, 2) lie within the frame: (…,) bool."""
        return ((place >= 0) & (place < (self.rows, self.columns))).all(-1)


def cast(geometry: MapGeometry, origin: np.ndarray, direction: np.ndarray) -> Hits:
    """Follows each of R rays to its first surface.

    Args:
        geometry: the map.
        origin: (R, 3) x, y, z in metres, within the map.
        direction: (R, 3), of any length but not straight up or down.
    """
    origin, direction = np.broadcast_arrays(np.asarray(origin, np.float64), np.asarray(direction, np.float64))
    walls = _Walls.of(geometry)
    chunk = max(1, PAIRS_AT_A_TIME // len(walls.segments))
    parts = [
        _cast(geometry, walls, origin[start : start + chunk], direction[start : start + chunk])
        for start in range(0, max(1, len(origin)), chunk)
    ]
    distance, surface, sector, uncertain = (np.concatenate(column) for column in zip(*parts, strict=True))
    met = surface != Surface.NOTHING
    point = origin + np.where(met, distance, np.nan)[:, None] * direction
    return Hits(surface, distance, point, sector, uncertain)


def standing_height(geometry: MapGeometry, position: np.ndarray) -> np.ndarray:
    """The floor under players at (P, 2) positions in metres: (P,) metres, NaN in the void.

    It is the highest floor under their square of 32 by 32 map units that is at most one step above that under its
    centre.
    """
    height = np.full(len(position), np.nan)
    segments, lower = geometry.segments, np.minimum
    for i, (point, sector) in enumerate(zip(position, geometry.sectors_at(position), strict=True)):
        if sector < 0:
            continue
        ends = segments.reshape(-1, 2, 2) - point
        inside = (lower(*ends.swapaxes(0, 1)) < PLAYER_RADIUS) & (-lower(*-ends.swapaxes(0, 1)) > -PLAYER_RADIUS)
        # The line intersects the square if the square's corners are not all on one side of it.
        (dx, dy), (x, y) = (ends[:, 1] - ends[:, 0]).T, ends[:, 0].T
        touched = geometry.sector[inside.all(1) & (abs(dy * x - dx * y) < PLAYER_RADIUS * (abs(dx) + abs(dy)))]
        floors = geometry.floor[touched]
        middle = geometry.floor[sector]
        height[i] = floors[floors <= middle + STEP_HEIGHT + 1e-9].max(initial=middle)
    return height


@dataclass(frozen=True)
class _Walls:
    """The lines, each seen from the sector on its right; those within a sector appear twice."""

    segments: np.ndarray
    sector: np.ndarray
    beyond: np.ndarray
    grating: np.ndarray

    @classmethod
    def of(cls, geometry: MapGeometry) -> "_Walls":
        within = geometry.sector == geometry.beyond
        other_way = geometry.segments[within][:, [2, 3, 0, 1]]
        rest = (np.append(array, array[within]) for array in (geometry.sector, geometry.beyond, geometry.grating))
        return cls(np.concatenate([geometry.segments, other_way]), *rest)


def _cast(
    geometry: MapGeometry, walls: _Walls, origin: np.ndarray, direction: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Distance, surface, sector and uncertain of a chunk of rays."""
    rays = len(origin)
    # The cross product of a ray with the vector from its origin to a point, for all rays and points at once.
    (dx, dy, _), (x, y, _) = direction.T, origin.T
    left_of = np.stack((dx, -dy, dy * x - dx * y), axis=1)
    x1, y1, x2, y2 = walls.segments.T
    starts_left = left_of @ np.stack((y1, x1, np.ones_like(x1))) > 0
    ends_left = left_of @ np.stack((y2, x2, np.ones_like(x2))) > 0
    ray, wall = np.nonzero(starts_left & ~ends_left)  # the ray comes from the line's right

    ex, ey = (x2 - x1)[wall], (y2 - y1)[wall]
    to_line = (x1[wall] - x[ray]) * ey - (y1[wall] - y[ray]) * ex
    distance = to_line / (dx[ray] * ey - dy[ray] * ex)
    ahead = distance > 0
    ray, wall, distance = ray[ahead], wall[ahead], distance[ahead]

    hung = walls.grating[wall]
    gratings = ray[hung], distance[hung]
    near, beyond = walls.sector[wall], walls.beyond[wall]
    start, slope = origin[ray, 2], direction[ray, 2]
    height = start + distance * slope
    solid = beyond < 0
    below, above = height < geometry.floor[near], height > geometry.ceiling[near]
    lower, upper = height < geometry.floor[beyond], height > geometry.ceiling[beyond]
    stops = np.flatnonzero(below | above | solid | lower | upper)
    first = stops[np.lexsort((distance[stops], ray[stops]))]
    first = first[np.unique(ray[first], return_index=True)[1]]

    ray, near, beyond, slope, start = ray[first], near[first], beyond[first], slope[first], start[first]
    below, above, solid, upper, lower = below[first], above[first], solid[first], upper[first], lower[first]
    # Between two sectors under open sky there is no upper wall: sky is drawn in its place.
    sky = geometry.sky[near] & (above | upper & ~lower & ~solid & ~below & geometry.sky[beyond])
    surface = np.select([sky, below, above], [Surface.SKY, Surface.FLOOR, Surface.CEILING], Surface.WALL)
    plane = np.where(below, geometry.floor[near], geometry.ceiling[near])
    with np.errstate(divide="ignore", invalid="ignore"):
        met = np.where(below | above, (plane - start) / slope, distance[first])
    moving = np.where(below | above, geometry.moving[near], ~solid & geometry.moving[beyond])

    result = (np.full(rays, np.inf), np.zeros(rays, np.int8), np.full(rays, -1), np.zeros(rays, bool))
    for whole, part in zip(result, (met, surface, near, moving), strict=True):
        whole[ray] = part
    passed = gratings[0][gratings[1] < result[0][gratings[0]]]
    result[3][passed] = True
    return result
