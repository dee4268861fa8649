from dataclasses import replace

import numpy as np
import pytest

from cdit.doom.geometry import MapGeometry, distance_to_segments


def square(x: float, size: float) -> np.ndarray:
    """(4, 4) the walls of a square room whose lower left corner is (x, 0)."""
    corners = np.array([[x, 0], [x + size, 0], [x + size, size], [x, size]], float)
    return np.concatenate([corners, np.roll(corners, -1, axis=0)], axis=1)


@pytest.fixture
def rooms() -> MapGeometry:
    """A room of 4 by 4 metres, and beside it one that is too low to stand in."""
    return MapGeometry(
        segments=np.concatenate([square(0, 4), square(4, 4)]),
        blocking=np.ones(8, bool),
        sector=np.repeat([0, 1], 4),
        beyond=np.full(8, -1),
        grating=np.zeros(8, bool),
        floor=np.zeros(2),
        ceiling=np.array([4.0, 1.0]),
        sky=np.zeros(2, bool),
        moving=np.zeros(2, bool),
    )


def test_sector_at(rooms):
    assert rooms.sector_at(np.array([1.0, 1.0])) == 0
    assert rooms.sector_at(np.array([6.0, 3.0])) == 1
    assert rooms.sector_at(np.array([9.0, 1.0])) is None


def test_a_line_within_a_sector_encloses_nothing(rooms):
    """Of a fence in the first room there is one side, or both; neither changes where the room is."""
    for lines in (1, 2):
        fence = np.array([[1.5, 0.5, 1.5, 1.5], [1.5, 1.5, 1.5, 0.5]])[:lines]
        fenced = replace(
            rooms,
            segments=np.concatenate([rooms.segments, fence]),
            sector=np.concatenate([rooms.sector, [0] * lines]),
            beyond=np.concatenate([rooms.beyond, [0] * lines]),
        )
        assert fenced.sectors_at(np.array([[1.0, 1.0], [6.0, 3.0], [9.0, 1.0]])).tolist() == [0, 1, -1]


def test_one_stands_clear_of_walls_and_under_high_ceilings(rooms):
    assert rooms.is_free(np.array([2.0, 2.0]))
    assert not rooms.is_free(np.array([0.5, 2.0]))
    assert not rooms.is_free(np.array([6.0, 2.0]))
    assert not rooms.is_free(np.array([2.0, 5.0]))


def test_random_free_points_are_free_and_spread(rooms):
    rng = np.random.default_rng(0)
    points = np.stack([rooms.random_free_point(rng) for _ in range(200)])
    assert all(rooms.is_free(point) for point in points)
    assert (np.ptp(points, axis=0) > 2).all()


def test_closed_doors_are_noticed(rooms):
    assert rooms.has_doors


def test_distance_to_segments():
    segments = np.array([[0, 0, 4, 0], [0, 0, 0, 0]], float)
    np.testing.assert_allclose(distance_to_segments(np.array([2.0, 3.0]), segments), [3, 13**0.5])
    np.testing.assert_allclose(distance_to_segments(np.array([7.0, 4.0]), segments[:1]), [5])


def test_the_maze(maze_geometry, tmp_path):
    assert len(maze_geometry.floor) == 18
    assert not maze_geometry.has_doors
    np.testing.assert_allclose(maze_geometry.ceiling - maze_geometry.floor, 128 / 32 * 1.2)
    corners = maze_geometry.segments.reshape(-1, 2)
    np.testing.assert_allclose(corners.min(0), [5.0, -22.0])
    maze_geometry.save(tmp_path / "maps" / "maze.npz")
    with np.load(tmp_path / "maps" / "maze.npz", allow_pickle=False) as saved:
        assert set(saved) == {
            "segments",
            "blocking",
            "sector",
            "beyond",
            "grating",
            "floor",
            "ceiling",
            "sky",
            "moving",
        }
        np.testing.assert_array_equal(saved["segments"], maze_geometry.segments)
    assert [p.name for p in (tmp_path / "maps").iterdir()] == ["maze.npz"]
