import numpy as np
import torch
from PIL import Image

from cdit.doom.correspondence import Correspondence, Sight
from cdit.doom.raycast import Surface
from cdit.heads.correspondence_figure import CELL, CROSS, FAINT, GAP, HEADING, correspondence_figure

GRID = (4, 4)
GREY = torch.full((3, 32, 32), 90, dtype=torch.uint8)


def draw(sight: Sight, place: tuple[float, float]) -> Image.Image:
    """Patch 5 (row 1, column 1), the only one drawn with a grid of 4 × 4 and 4 points, or so."""
    sights = np.full((16, 2), Sight.OUTSIDE, np.int8)
    sights[5, 1] = sight
    sights[5, 0] = Sight.UNKNOWN
    places = np.full((16, 2, 2), np.nan)
    places[5, 1] = place
    correspondence = Correspondence(
        places, sights, np.full(16, Surface.WALL, np.int8), np.zeros(16, bool), np.zeros((16, 3)), np.ones((16, 2))
    )
    return correspondence_figure(GREY, torch.stack((GREY, GREY)), correspondence, GRID, points=4)


def disc(figure: Image.Image, column: int, place: tuple[float, float]) -> np.ndarray:
    """The picture within 20 pixels of a place in patches in the column-th frame."""
    x = GAP + column * (CELL + GAP) + round(place[1] * CELL / 4)
    y = HEADING + round(place[0] * CELL / 4)
    return np.asarray(figure)[y - 20 : y + 20, x - 20 : x + 20]


def has(pixels: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((pixels == colour).all(-1).any())


def test_visible_points_are_where_they_are_said_to_be_in_the_colour_of_the_target():
    figure = draw(Sight.VISIBLE, (2.5, 0.7))
    assert figure.size == (GAP + 3 * (CELL + GAP), HEADING + CELL + 56)
    colour = tuple(disc(figure, 0, (1.5, 1.5))[28, 14])
    assert colour != (90, 90, 90)
    there = disc(figure, 2, (2.5, 0.7))
    assert has(there, colour)
    assert not has(there, CROSS)
    assert not has(disc(figure, 1, (2.5, 0.7)), colour)


def test_hidden_points_are_crossed_out():
    assert has(disc(draw(Sight.HIDDEN, (2.5, 0.7)), 2, (2.5, 0.7)), CROSS)


def test_unknown_points_are_a_grey_dot_and_outside_ones_nowhere():
    figure = draw(Sight.UNKNOWN, (np.nan, np.nan))
    assert has(disc(figure, 0, (1.5, 1.5)), FAINT)
    outside = np.asarray(draw(Sight.OUTSIDE, (np.nan, np.nan)))
    frames = outside[HEADING : HEADING + CELL, 2 * GAP + CELL :]
    assert set(map(tuple, frames.reshape(-1, 3))) == {(90, 90, 90), (255, 255, 255)}
