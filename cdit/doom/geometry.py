"""A map's walls and floors in metres, and places to stand."""

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from cdit.common.errors import DataError
from cdit.common.files import read_arrays
from cdit.doom.engine import HEIGHT_UNITS_PER_METRE, UNITS_PER_METRE, Engine
from cdit.doom.wad import NOWHERE

PLAYER_HEIGHT = 56 / HEIGHT_UNITS_PER_METRE
CLEARANCE = 24 / UNITS_PER_METRE
"""Distance from blocking walls at which to stand; Doom's player is a square 32 units wide."""


@dataclass(frozen=True)
class MapGeometry:
    """Wall lines and the sectors they border at the start of the map (doors closed, lifts at rest).

    A line between two sectors appears twice, once for each of them; one within a sector once. Heights are in the
    metres of the recorded camera (see `cdit.doom.engine.PIXEL_STRETCH`).
    """

    segments: np.ndarray
    """(N, 4) float64: x1, y1, x2, y2 in metres; the sector is on the right, seen from (x1, y1) to (x2, y2)."""
    blocking: np.ndarray
    """(N,) bool: the line is impassable, whatever the heights on both sides."""
    sector: np.ndarray
    """(N,) int64: index of the sector that this line borders."""
    beyond: np.ndarray
    """(N,) int64: index of the sector on the other side, -1 if there is none."""
    grating: np.ndarray
    """(N,) bool: between the two is a partly transparent texture: gratings, fences, vines."""
    floor: np.ndarray
    """(S,) float64: floor heights of the sectors in metres."""
    ceiling: np.ndarray
    """(S,) float64: ceiling heights of the sectors in metres."""
    sky: np.ndarray
    """(S,) bool: the ceiling is open sky."""
    moving: np.ndarray
    """(S,) bool: the floor or the ceiling may move, as in doors and lifts."""

    @classmethod
    def of(cls, engine: Engine) -> "MapGeometry":
        """Reads the map that is open in an engine."""
        sectors, wad = engine.sectors(), engine.wad_map()
        right, left = wad.sides.T
        has_left = (left != NOWHERE) & (left != right)
        return cls(
            segments=np.concatenate([wad.lines, wad.lines[has_left][:, [2, 3, 0, 1]]]) / UNITS_PER_METRE,
            blocking=np.concatenate([wad.blocking, wad.blocking[has_left]]),
            sector=np.concatenate([right, left[has_left]]),
            beyond=np.concatenate([left, right[has_left]]),
            grating=np.concatenate([wad.grating, wad.grating[has_left]]),
            floor=np.array([s.floor_height for s in sectors]) / HEIGHT_UNITS_PER_METRE,
            ceiling=np.array([s.ceiling_height for s in sectors]) / HEIGHT_UNITS_PER_METRE,
            sky=wad.sky,
            moving=wad.moving,
        )

    @classmethod
    def load(cls, path: Path) -> "MapGeometry":
        """Reads what `save` wrote.

        Raises:
            DataError: the file is missing, not a geometry, or of an older version.
        """
        try:
            saved = read_arrays(path)
            return cls(**{field.name: saved[field.name] for field in fields(cls)})
        except (DataError, KeyError) as error:
            raise DataError(
                f"{path}: not a map's geometry ({error}); delete the folder {path.parent} and run the recipe of the "
                "dataset again, which rewrites the maps and keeps the frames"
            ) from error

    def save(self, path: Path) -> None:
        """Writes an `.npz` with one array per field, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{os.getpid()}.{path.name}")
        np.savez_compressed(partial, **asdict(self))
        os.replace(partial, path)

    @property
    def has_doors(self) -> bool:
        """Whether there are sectors too low to pass, such as closed doors."""
        return bool((self.ceiling - self.floor < PLAYER_HEIGHT).any())

    def sectors_at(self, points: np.ndarray) -> np.ndarray:
        """Index of the sector around each of (P, 2) points in metres: (P,) int64; -1 in the void."""
        border = self.sector != self.beyond  # a line within a sector does not enclose it
        x1, y1, x2, y2 = self.segments[border].T
        sector = self.sector[border]
        found = np.full(len(points), -1)
        for i, (x, y) in enumerate(points):
            crosses = (y1 > y) != (y2 > y)
            x_there = x1[crosses] + (y - y1[crosses]) * (x2 - x1)[crosses] / (y2 - y1)[crosses]
            crossings = np.bincount(sector[crosses][x < x_there], minlength=len(self.floor))
            around = np.flatnonzero(crossings % 2)
            found[i] = around[0] if len(around) else -1
        return found

    def sector_at(self, point: np.ndarray) -> int | None:
        """Index of the sector around a (2,) point in metres; None in the void."""
        sector = int(self.sectors_at(point[None])[0])
        return None if sector < 0 else sector

    def is_free(self, point: np.ndarray) -> bool:
        """Whether a player can stand at a (2,) point in metres: in a sector that is high enough, clear of blocking
        walls.
        """
        sector = self.sector_at(point)
        if sector is None or self.ceiling[sector] - self.floor[sector] < PLAYER_HEIGHT:
            return False
        return distance_to_segments(point, self.segments[self.blocking]).min(initial=np.inf) > CLEARANCE

    def random_free_point(self, rng: np.random.Generator) -> np.ndarray:
        """A (2,) point in metres, uniform over the places where a player can stand."""
        corners = self.segments.reshape(-1, 2)
        while True:
            point = rng.uniform(corners.min(0), corners.max(0))
            if self.is_free(point):
                return point


def distance_to_segments(point: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Distances from a (2,) point to (N, 4) segments: (N,), in the unit of both."""
    start, along = segments[:, :2], segments[:, 2:] - segments[:, :2]
    length_squared = (along**2).sum(1).clip(min=1e-12)
    share = (((point - start) * along).sum(1) / length_squared).clip(0, 1)
    return np.linalg.norm(start + share[:, None] * along - point, axis=1)
