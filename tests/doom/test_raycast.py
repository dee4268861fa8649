import math
from collections.abc import Callable

import numpy as np
import pytest
from rooms import build, pillar, room, two_rooms

from cdit.common.errors import UserError
from cdit.data.layout import Camera
from cdit.doom.geometry import MapGeometry
from cdit.doom.raycast import Hits, Surface, View, cast, standing_height

EYE = np.array([3.0, 4.0, 1.5])


def random_directions(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    yaw, up = rng.uniform(0, 2 * math.pi, count), rng.uniform(-0.8, 0.8, count)
    return np.stack((np.cos(yaw), np.sin(yaw), up), axis=1)


def look(geometry: MapGeometry, *direction: float, eye: np.ndarray = EYE) -> tuple[Surface, float]:
    hits = cast(geometry, eye[None], np.array([direction]))
    return Surface(hits.surface[0]), float(hits.distance[0])


def march(
    is_solid: Callable[..., np.ndarray], eye: np.ndarray, directions: np.ndarray, step: float = 2e-3
) -> np.ndarray:
    """Distances at which rays first are in solid matter, found by small steps."""
    t = np.arange(0, 20, step)
    points = eye + t[:, None] * directions[:, None]
    return t[is_solid(*np.moveaxis(points, -1, 0)).argmax(1)]


def test_an_empty_room_is_a_box():
    """Against the distances to the six planes of the box."""
    geometry = build(room(0, 0, 10, 8), [(0, 4)])
    directions = random_directions(2000)
    hits = cast(geometry, np.broadcast_to(EYE, directions.shape), directions)
    with np.errstate(divide="ignore"):
        planes = np.where(directions > 0, (np.array([10, 8, 4]) - EYE) / directions, -EYE / directions)
    np.testing.assert_allclose(hits.distance, planes.min(1), rtol=1e-12)
    axis = planes.argmin(1)
    expected = np.where(axis < 2, Surface.WALL, np.where(directions[:, 2] > 0, Surface.CEILING, Surface.FLOOR))
    np.testing.assert_array_equal(hits.surface, expected)
    np.testing.assert_allclose(hits.point, EYE + planes.min(1)[:, None] * directions, atol=1e-12)
    assert (hits.sector == 0).all()
    assert not hits.uncertain.any()


@pytest.mark.parametrize(
    ("first", "second"),
    [((0, 4), (1, 4)), ((0, 4), (0, 2.5)), ((0, 4), (1, 2)), ((0, 4), (-1, 5)), ((0, 4), (2, 2)), ((0, 4), (5, 9))],
    ids=["step up", "low ceiling", "window", "step down", "closed", "far above"],
)
def test_two_rooms_a_pillar_and_a_step_against_marching_through_them(first, second):
    lines = [(5, 8, 5, 0, 0, 1), *room(0, 0, 5, 8, 0)[:2], room(0, 0, 5, 8, 0)[3], *room(5, 0, 10, 8, 1)[1:]]
    geometry = build([*lines, *pillar(1, 5, 2, 6, 0), *room(7, 2, 8, 5, 2, 1)], [first, second, (1.5, 3.5)])

    def is_solid(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        column = (x > 7) & (x < 8) & (y > 2) & (y < 5)
        floor = np.where(column, 1.5, np.where(x > 5, second[0], first[0]))
        ceiling = np.where(column, 3.5, np.where(x > 5, second[1], first[1]))
        stone = (x > 1) & (x < 2) & (y > 5) & (y < 6)
        outside = (x < 0) | (x > 10) | (y < 0) | (y > 8)
        return stone | outside | (z < floor) | (z > ceiling)

    directions = random_directions(400, seed=1)
    hits = cast(geometry, EYE[None], directions)
    np.testing.assert_allclose(hits.distance, march(is_solid, EYE, directions), atol=2.1e-3)


def test_what_is_met_at_a_step():
    geometry = two_rooms((0, 4), (1, 3))
    assert look(geometry, 1, 0, -0.4) == (Surface.WALL, 2)  # at x = 5 at 0.7 m: the step
    assert look(geometry, 1, 0, -0.2) == (Surface.FLOOR, pytest.approx(2.5))  # the floor on it
    assert look(geometry, 1, 0, 0) == (Surface.WALL, 7)
    assert look(geometry, 1, 0, 0.5) == (Surface.CEILING, pytest.approx(3))
    assert look(geometry, 1, 0, 0.9) == (Surface.WALL, 2)  # above the lower ceiling
    hits = cast(geometry, EYE[None], np.array([[1, 0, -0.4], [1, 0, -0.2]]))
    assert hits.sector.tolist() == [0, 1]


def test_sky_is_no_ceiling_and_ends_the_view_where_the_map_does():
    inside_out = two_rooms((0, 4), (0, 4), sky=[1])
    assert look(inside_out, 1, 0, 0.8)[0] == Surface.SKY
    assert look(inside_out, -1, 0, 2)[0] == Surface.CEILING
    assert look(inside_out, 1, 0, 0)[0] == Surface.WALL
    assert look(two_rooms((0, 4), (0, 2.5), sky=[0]), 1, 0, 0.8) == (Surface.WALL, 2)  # a house under the sky
    assert look(two_rooms((0, 4), (0, 2.5), sky=[0, 1]), 1, 0, 0.8) == (Surface.SKY, 2)  # sky meets lower sky
    assert look(two_rooms((0, 4), (1, 2.5), sky=[0, 1]), 1, 0, -0.4) == (Surface.WALL, 2)
    assert look(two_rooms((0, 4), (0, 2.5), sky=[0, 1]), -1, 0, 0.6) == (Surface.WALL, 3)  # one-sided walls are drawn
    assert look(two_rooms((0, 4), (-6, -2), sky=[0, 1]), 1, 0, -1)[0] == Surface.FLOOR  # at the edge of a deep valley


def test_doors_and_what_is_behind_gratings_are_uncertain():
    def uncertain(geometry: MapGeometry, *direction: float) -> bool:
        return bool(cast(geometry, EYE[None], np.array([direction])).uncertain[0])

    door = two_rooms((0, 4), (0, 0), moving=[1])
    assert uncertain(door, 1, 0, 0.1)
    assert not uncertain(door, -1, 0, 0.1)
    assert not uncertain(door, 1, 0, -1)
    lift = two_rooms((0, 4), (0, 4), moving=[1])
    assert uncertain(lift, 1, 0, -0.5)
    assert not uncertain(lift, 1, 0, 0)  # its far wall stays
    grating = two_rooms((0, 4), (0, 4), gratings=[0])
    assert uncertain(grating, 1, 0, 0)
    assert not uncertain(grating, 1, 0, -1)
    assert not uncertain(grating, -1, 0, 0)
    eye = np.array([8.0, 4.0, 1.5])
    assert cast(grating, eye[None], np.array([[-1.0, 0, 0]])).uncertain[0]
    fence = build([(5, 0, 5, 8, 0, 0), *room(0, 0, 10, 8)], [(0, 4)], gratings=[0])  # within a sector
    assert uncertain(fence, 1, 0, 0)
    assert cast(fence, eye[None], np.array([[-1.0, 0, 0]])).uncertain[0]


def test_a_line_within_a_sector_stops_nothing():
    geometry = build([*room(0, 0, 10, 8), (5, 0, 5, 8, 0, 0)], [(0, 4)])
    assert look(geometry, 1, 0, 0) == (Surface.WALL, 7)
    assert geometry.sectors_at(np.array([[3.0, 4], [7, 4], [11, 4]])).tolist() == [0, 0, -1]


def test_rays_that_leave_the_map_meet_nothing():
    hits = cast(build(room(0, 0, 10, 8)[:2], [(0, 4)]), EYE[None], np.array([[1.0, 0, 0], [-1, 0, 0]]))
    assert hits.surface.tolist() == [Surface.NOTHING, Surface.WALL]
    assert hits.distance.tolist() == [math.inf, 3]
    assert np.isnan(hits.point[0]).all()
    assert hits.sector.tolist() == [-1, 0]


def test_rays_do_not_slip_through_corners():
    geometry = build(room(0, 0, 10, 8), [(0, 4)])
    directions = np.array([[10.0, 8], [0, 8], [10, 0], [0, 0]]) - EYE[:2]
    hits = cast(geometry, EYE[None], np.concatenate([directions, np.zeros((4, 1))], axis=1))
    np.testing.assert_allclose(hits.distance, 1)


def test_many_rays_are_taken_in_pieces(monkeypatch):
    geometry = two_rooms((0, 4), (1, 3))
    directions = random_directions(100)
    whole: Hits = cast(geometry, EYE[None], directions)
    monkeypatch.setattr("cdit.doom.raycast.PAIRS_AT_A_TIME", 64)
    pieces = cast(geometry, EYE[None], directions)
    for name in ("surface", "distance", "point", "sector", "uncertain"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(pieces, name))
    assert len(cast(geometry, np.zeros((0, 3)), np.zeros((0, 3))).distance) == 0


def test_one_stands_on_the_highest_step_one_touches():
    """A player is 1 m wide, and a step of 0.9 m can be climbed."""
    geometry = two_rooms((0, 4), (0.5, 4))
    positions = np.array([[3, 4], [4.4, 4], [4.6, 4], [5.2, 4], [7, 4], [12, 4]], float)
    np.testing.assert_allclose(standing_height(geometry, positions), [0, 0, 0.5, 0.5, 0.5, math.nan])
    high = two_rooms((0, 4), (1, 4))
    np.testing.assert_allclose(standing_height(high, positions[:5]), [0, 0, 0, 1, 1])
    diagonal = build([*room(0, 0, 10, 8, 0), (6, 2, 2, 6, 1, 1)], [(0, 4), (0.5, 4)])
    np.testing.assert_allclose(standing_height(diagonal, np.array([[3.4, 3.4], [3.6, 3.6]])), [0, 0.5])


def test_patches_look_where_a_pinhole_camera_does():
    """Against f · tan: 64 × 48 pixels of a 128 × 96 camera 90° wide, patches of 8 pixels, at yaw 90°."""
    view = View.of(Camera(128, 96, math.pi / 2, 1.5), (48, 64), "aspect", (6, 8))
    rays = view.centre_rays(np.array(math.pi / 2)).reshape(6, 8, 3)
    focal = 32
    for row, column in ((0, 0), (2, 5), (5, 7)):
        right, down = (column * 8 + 4 - 32) / focal, (row * 8 + 4 - 24) / focal
        np.testing.assert_allclose(rays[row, column], [right, 1, -down], atol=1e-12)


def test_projecting_undoes_looking():
    view = View.of(Camera(64, 64, 1.2, 1.5), (32, 64), "none", (4, 8))
    assert view.half_height == pytest.approx(view.half_width)  # the squeezed frame shows all of the square one
    yaw = np.array([0.3, 2.0, -1.0])
    rays = view.centre_rays(yaw)
    place, depth = view.project(2.5 * rays, yaw[:, None])
    rows, columns = np.meshgrid(np.arange(4) + 0.5, np.arange(8) + 0.5, indexing="ij")
    np.testing.assert_allclose(place, np.broadcast_to(np.stack((rows.ravel(), columns.ravel()), 1), (3, 32, 2)))
    np.testing.assert_allclose(depth, 2.5)
    behind, depth = view.project(-rays, yaw[:, None])
    assert np.isnan(behind).all()
    assert (depth < 0).all()


def test_a_camera_that_looks_up_is_refused():
    with pytest.raises(UserError, match=r"camera.pitch is 0.1"):
        View.of(Camera(64, 64, 1.2, 1.5, pitch=0.1), (64, 64), "aspect", (8, 8))
