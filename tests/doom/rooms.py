"""Small maps built line by line, for tests that compute by hand what is to be seen in them."""

from collections.abc import Sequence

import numpy as np

from cdit.doom.geometry import MapGeometry

VOID = -1
Line = tuple[float, float, float, float, int, int]
"""x1, y1, x2, y2, and the sectors to the right and to the left of the way from the one end to the other."""


def build(
    lines: Sequence[Line],
    heights: Sequence[tuple[float, float]],
    sky: Sequence[int] = (),
    moving: Sequence[int] = (),
    gratings: Sequence[int] = (),
) -> MapGeometry:
    """A map of lines and the (floor, ceiling) of each sector; `gratings` are indices of lines."""
    listed = [(*line, index in gratings) for index, line in enumerate(lines)]
    listed += [
        (x2, y2, x1, y1, left, right, hung) for x1, y1, x2, y2, right, left, hung in listed if left not in (VOID, right)
    ]
    values = np.array(listed, float)
    floor, ceiling = np.array(heights, float).T
    return MapGeometry(
        segments=values[:, :4],
        blocking=values[:, 5] == VOID,
        sector=values[:, 4].astype(int),
        beyond=values[:, 5].astype(int),
        grating=values[:, 6].astype(bool),
        floor=floor,
        ceiling=ceiling,
        sky=np.isin(np.arange(len(floor)), sky),
        moving=np.isin(np.arange(len(floor)), moving),
    )


def room(x1: float, y1: float, x2: float, y2: float, inside: int = 0, outside: int = VOID) -> list[Line]:
    """The four sides of a rectangle, clockwise."""
    corners = [(x1, y1), (x1, y2), (x2, y2), (x2, y1)]
    return [(*corners[i], *corners[(i + 1) % 4], inside, outside) for i in range(4)]


def pillar(x1: float, y1: float, x2: float, y2: float, around: int = 0) -> list[Line]:
    """A rectangle of stone from the floor to the ceiling."""
    return [(bx, by, ax, ay, around, VOID) for ax, ay, bx, by, _, _ in room(x1, y1, x2, y2)]


def two_rooms(first: tuple[float, float], second: tuple[float, float], **options: Sequence[int]) -> MapGeometry:
    """Rooms from x = 0 to 5 and from 5 to 10, y = 0 to 8, of these (floor, ceiling), open to each other at line 0."""
    lines = [(5, 8, 5, 0, 0, 1), *room(0, 0, 5, 8, 0)[:2], room(0, 0, 5, 8, 0)[3], *room(5, 0, 10, 8, 1)[1:]]
    return build(lines, [first, second], **options)
