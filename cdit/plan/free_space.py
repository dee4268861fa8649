"""Distances along free space in a map: the shortest path for the player, and its length."""

import math
from dataclasses import dataclass

import numpy as np

from cdit.doom.geometry import PLAYER_HEIGHT, MapGeometry, distance_to_segments
from cdit.doom.raycast import PLAYER_RADIUS, STEP_HEIGHT

CELL = 0.25
"""Side of a cell in metres."""
CLEARANCE = PLAYER_RADIUS + 0.1
"""Smallest distance in metres between the centre of the player and a wall."""
MOVES = np.array([(i, j) for i in range(-2, 3) for j in range(-2, 3) if math.gcd(i, j) == 1])
"""Cells that are one move apart: with knights' moves, paths are at most 3 % too long."""
TURN_WEIGHT = 0.5
"""Metres that a radian of heading error counts for at the goal; falls linearly to zero 2 m away."""


class FreeSpace:
    """A grid over a map that marks where the player can be.

    Args:
        geometry: the map.
    """

    def __init__(self, geometry: MapGeometry):
        self.geometry = geometry
        corners = geometry.segments.reshape(-1, 2)
        self.origin = corners.min(0)
        self.shape = tuple(np.ceil((corners.max(0) - self.origin) / CELL).astype(int) + 1)
        points = self.origin + np.stack(np.indices(self.shape), axis=-1).reshape(-1, 2) * CELL
        sectors = geometry.sectors_at(points)
        high = np.where(sectors < 0, 0, geometry.ceiling[sectors] - geometry.floor[sectors]) >= PLAYER_HEIGHT
        blocking = walls(geometry)
        clear = [
            distance_to_segments(p, blocking).min(initial=np.inf) > CLEARANCE if h else False
            for p, h in zip(points, high, strict=True)
        ]
        self.free = np.array(clear).reshape(self.shape)
        floor = np.where(sectors < 0, 0, geometry.floor[sectors]).reshape(self.shape)
        # A move needs free ends and no high step; a knight's move also needs the two cells between its ends.
        self.passable = np.stack([
            self.free
            & np.all([_moved(self.free, cell, False) for cell in _passed(move)], axis=0)
            & (np.abs(_moved(floor, move, np.inf) - floor) <= STEP_HEIGHT)
            for move in MOVES
        ])  # fmt: skip

    def cell(self, position: np.ndarray) -> tuple[int, int]:
        """The free cell closest to a position (2,)."""
        free = np.argwhere(self.free)
        return tuple(free[((self.origin + free * CELL - position) ** 2).sum(1).argmin()])

    def centre(self, cell: tuple[int, int] | np.ndarray) -> np.ndarray:
        """The middle of a cell in metres."""
        return self.origin + np.asarray(cell) * CELL

    def distances(self, position: np.ndarray) -> "Distances":
        """Distances from all cells to a position (2,), by relaxation until nothing changes."""
        grid = np.full(self.shape, np.inf)
        grid[self.cell(position)] = 0.0
        while True:
            before = grid
            for move, passable in zip(MOVES, self.passable, strict=True):
                there = _moved(grid, move, np.inf) + CELL * math.hypot(*move)
                grid = np.where(passable & (there < grid), there, grid)
            if np.array_equal(before, grid):
                return Distances(self, np.asarray(position, float), grid)


@dataclass
class Distances:
    """Distances along free space to one position."""

    space: FreeSpace
    goal: np.ndarray
    grid: np.ndarray
    """(W, H) metres; infinite where there is no path."""

    def at(self, position: np.ndarray) -> np.ndarray:
        """Metres from positions (…, 2): the straight line within two cells of the goal, otherwise along the grid."""
        cells = np.round((np.asarray(position) - self.space.origin) / CELL).astype(int)
        cells = np.clip(cells, 0, np.array(self.space.shape) - 1)
        direct = np.linalg.norm(position - self.goal, axis=-1)
        return np.where(direct < 2 * CELL, direct, np.maximum(self.grid[cells[..., 0], cells[..., 1]], direct))

    def left(self, position: np.ndarray) -> float:
        """As `at` for one position (2,); from the closest free cell if a wall is closer than `CLEARANCE`."""
        distance = float(self.at(position))
        if math.isfinite(distance):
            return distance
        cell = self.space.cell(position)
        return float(self.grid[cell] + np.linalg.norm(self.space.centre(cell) - position))

    def cost(self, pose: np.ndarray, goal_yaw: float) -> np.ndarray:
        """Metres from poses (…, 3), 1000 without a path, plus the heading error near the goal (`TURN_WEIGHT`)."""
        far = np.minimum(self.at(pose[..., :2]), 1e3)
        turn = np.abs((pose[..., 2] - goal_yaw + np.pi) % (2 * np.pi) - np.pi)
        return far + TURN_WEIGHT * turn * np.clip(1 - far / 2, 0, 1)

    def path(self, position: np.ndarray) -> np.ndarray:
        """The path to the goal from a position (2,), cell by cell: (P, 2)."""
        cell, way = self.space.cell(position), []
        while 0 < self.grid[cell] < np.inf:
            around = [
                (move, cell[0] + move[0], cell[1] + move[1]) for move in MOVES[self.space.passable[:, cell[0], cell[1]]]
            ]
            cell = min(((i, j) for _, i, j in around), key=lambda n: self.grid[n] + CELL * math.dist(n, cell))
            way.append(self.space.centre(cell))
        return np.array([*way[:-1], self.goal])


def walls(geometry: MapGeometry) -> np.ndarray:
    """Lines (N, 4) of a map that cannot be passed, in metres."""
    return geometry.segments[geometry.blocking | (geometry.beyond < 0)]


def _passed(move: np.ndarray) -> list[np.ndarray]:
    """The end of a move, and for a knight's move the two cells that it passes between."""
    half = move / 2
    return [move, *([np.floor(half).astype(int), np.ceil(half).astype(int)] if np.abs(move).max() == 2 else [])]


def _moved(grid: np.ndarray, move: np.ndarray, outside: float | bool) -> np.ndarray:
    """For each cell, the value of the grid one move away."""
    padded = np.pad(grid, 2, constant_values=outside)
    i, j = 2 + np.asarray(move)
    return padded[i : i + grid.shape[0], j : j + grid.shape[1]]
