import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from rooms import build, pillar, room, two_rooms

from cdit.common.errors import DataError
from cdit.data.config import DataConfig
from cdit.data.layout import Camera, DatasetInfo, write_split, write_trajectory
from cdit.data.windows import WindowDataset
from cdit.doom.correspondence import Correspondence, Sight, WindowCorrespondence, correspondences
from cdit.doom.geometry import MapGeometry
from cdit.doom.raycast import Surface, View

GRID = 8
VIEW = View(0.75, 0.75, GRID, GRID)
CENTRES = np.stack(np.meshgrid(np.arange(GRID) + 0.5, np.arange(GRID) + 0.5, indexing="ij"), axis=-1).reshape(-1, 2)
HALL = build(room(0, 0, 20, 16), [(0, 4)])
EYE = (5.0, 8.0, 1.5)


def between(geometry: MapGeometry, target: tuple, past: tuple, target_yaw: float = 0, past_yaw: float = 0):
    """With one past frame, whose dimension is taken out."""
    seen = correspondences(
        geometry, VIEW, np.array(target), np.array(target_yaw), np.array([past]), np.array([past_yaw])
    )
    return seen.place[:, 0], seen.sight[:, 0], seen


def test_a_frame_corresponds_to_itself():
    place, sight, seen = between(HALL, EYE, EYE, 0.4, 0.4)
    assert (sight == Sight.VISIBLE).all()
    np.testing.assert_allclose(place, CENTRES)
    assert set(seen.surface) == {Surface.WALL, Surface.FLOOR, Surface.CEILING}


@pytest.mark.parametrize("degrees", [10, -25])
def test_turning_on_the_spot_moves_columns_by_the_tangent(degrees):
    """What the target shows at angle a to the left was at a + turn before a turn to the left; rows stretch with it."""
    turn = math.radians(degrees)
    place, sight, _ = between(HALL, EYE, EYE, target_yaw=1 + turn, past_yaw=1)
    angle = np.arctan((1 - CENTRES[:, 1] / 4) * 0.75)
    column = 4 * (1 - np.tan(angle + turn) / 0.75)
    row = 4 + (CENTRES[:, 0] - 4) * np.cos(angle) / np.cos(angle + turn)
    inside = (column >= 0) & (column < 8) & (row >= 0) & (row < 8)
    np.testing.assert_array_equal(sight == Sight.VISIBLE, inside)
    np.testing.assert_array_equal(sight == Sight.OUTSIDE, ~inside)
    np.testing.assert_allclose(place[inside], np.stack((row, column), 1)[inside])
    assert np.isnan(place[~inside]).all()
    assert inside.any()
    assert not inside.all()


def test_walking_forward_expands_the_picture_from_its_centre():
    """A point at depth d was at depth d + 2 two metres earlier, so nearer to the centre by d / (d + 2)."""
    place, sight, seen = between(HALL, (7.0, 8, 1.5), EYE)
    down = (CENTRES[:, 0] / 4 - 1) * 0.75
    left = (1 - CENTRES[:, 1] / 4) * 0.75
    with np.errstate(divide="ignore"):
        planes = [13 / np.ones(64), np.where(down > 0, 1.5, 2.5) / abs(down), 8 / abs(left)]
    depth = np.min(planes, axis=0)
    assert (sight == Sight.VISIBLE).all()
    np.testing.assert_allclose(place, 4 + (CENTRES - 4) * (depth / (depth + 2))[:, None])
    np.testing.assert_allclose(seen.depth[:, 0], depth + 2)
    # and back: walking backwards, what was at the border is lost
    _, sight, _ = between(HALL, EYE, (7.0, 8, 1.5))
    assert set(sight) == {Sight.VISIBLE, Sight.OUTSIDE}
    assert (sight.reshape(8, 8)[3:5, 3:5] == Sight.VISIBLE).all()


def test_what_is_behind_the_camera_is_outside():
    _, sight, _ = between(HALL, EYE, EYE, 0, math.pi)
    assert (sight == Sight.OUTSIDE).all()


def test_a_pillar_hides_a_strip_of_the_wall():
    """Past eye at (5, 8), pillar from (8, 7) to (9, 9): its shadow on the wall x = 20 is 8 ± 15 / 3."""
    geometry = build([*room(0, 0, 20, 16), *pillar(8, 7, 9, 9)], [(0, 4)])
    place, sight, seen = between(geometry, (10.0, 8.0, 1.5), EYE)
    wall = (seen.surface == Surface.WALL) & (seen.point[:, 0] > 19.9)
    in_shadow = abs(seen.point[:, 1] - 8) < 15 / 3
    assert (sight[wall & in_shadow] == Sight.HIDDEN).all()
    assert (sight[wall & ~in_shadow] == Sight.VISIBLE).all()
    assert (wall & in_shadow).any()
    assert (wall & ~in_shadow).any()
    assert np.isfinite(place[sight == Sight.HIDDEN]).all()
    # the pillar itself is seen by both from its other side
    place, sight, seen = between(geometry, (6.0, 8.0, 1.5), EYE)
    assert (sight[abs(seen.point[:, 0] - 8) < 1e-9] == Sight.VISIBLE).all()


def test_a_step_hides_what_is_below_and_above_it():
    """The floor on a platform as high as a wall is seen from it, and not from below; a low step hides nothing."""
    for height, expected in ((2.0, Sight.HIDDEN), (0.5, Sight.VISIBLE)):
        geometry = two_rooms((0, 4), (height, 6))
        _, sight, seen = between(geometry, (5.5, 4.0, height + 1.5), (0.5, 4.0, 1.5))
        floor = seen.surface == Surface.FLOOR
        inside = floor & (sight != Sight.OUTSIDE)
        assert inside.sum() >= 8
        assert (sight[inside] == expected).all()


def test_sky_doors_gratings_and_missing_frames_are_unknown():
    open_air = build(room(0, 0, 20, 16), [(0, 4)], sky=[0])
    _, sight, seen = between(open_air, EYE, EYE)
    np.testing.assert_array_equal(sight == Sight.UNKNOWN, seen.surface == Surface.SKY)
    assert (seen.surface == Surface.SKY).sum() == (CENTRES[:, 0] < 4 - 4 * 2.5 / 15 / 0.75).sum() > 0

    eye = (2.0, 4.0, 1.5)
    _, sight, seen = between(two_rooms((0, 4), (0, 0), moving=[1]), eye, eye)
    door = abs(seen.point[:, 0] - 5) < 1e-9
    np.testing.assert_array_equal(sight == Sight.UNKNOWN, door)
    assert door.any()
    _, sight, _ = between(two_rooms((0, 4), (0, 0), moving=[1]), eye, eye, 0, math.pi)
    np.testing.assert_array_equal(sight == Sight.UNKNOWN, door)  # nor is it outside

    _, sight, seen = between(two_rooms((0, 4), (0, 4), gratings=[0]), eye, eye)
    np.testing.assert_array_equal(sight == Sight.UNKNOWN, seen.point[:, 0] > 5)
    _, sight, _ = between(two_rooms((0, 4), (0, 4), gratings=[0]), (6.0, 4.0, 1.5), eye)
    assert set(sight) <= {Sight.UNKNOWN, Sight.OUTSIDE}

    place, sight, _ = between(HALL, EYE, (math.nan, math.nan, math.nan))
    assert (sight == Sight.UNKNOWN).all()
    assert np.isnan(place).all()


def test_targets_and_past_frames_are_taken_together():
    rng = np.random.default_rng(0)
    geometry = build([*room(0, 0, 20, 16), *pillar(8, 7, 9, 9)], [(0, 4)])
    target, past = (rng.uniform((1, 1, 1.5), (7, 15, 1.5), (*shape, 3)) for shape in ((2, 3), (2, 3, 4)))
    yaw, past_yaw = rng.uniform(-1, 1, (2, 3)), rng.uniform(-1, 1, (2, 3, 4))
    seen = correspondences(geometry, VIEW, target, yaw, past, past_yaw)
    assert seen.place.shape == (2, 3, 64, 4, 2)
    assert set(seen.sight.ravel()) == {Sight.VISIBLE, Sight.HIDDEN, Sight.OUTSIDE}
    place, sight, _ = between(geometry, target[1, 2], past[1, 2, 3], yaw[1, 2], past_yaw[1, 2, 3])
    np.testing.assert_array_equal(seen.sight[1, 2, :, 3], sight)
    np.testing.assert_array_equal(seen.place[1, 2, :, 3], place)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Walks of 8 frames along x, one on the map of two levels and one, with heights recorded, in the hall."""
    rng = np.random.default_rng(0)
    camera = Camera(32, 32, 2 * math.atan(0.75), eye_height=1.5)
    DatasetInfo("halls", metric_waypoint_spacing=0.5, camera=camera).save(tmp_path)
    position = np.stack((2 + 0.5 * np.arange(8), np.full(8, 4.0)), axis=1)
    for name, extra in (("two_levels_0000", {}), ("freedoom_hall_0012", {"eye": 1.5 + 0.1 * np.arange(8)})):
        frames = rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
        write_trajectory(tmp_path, name, frames, position, 0.05 * np.arange(8), **extra)
    write_split(tmp_path, "test", ["two_levels_0000", "freedoom_hall_0012"])
    two_rooms((0, 4), (0.5, 4)).save(tmp_path / "maps" / "two_levels.npz")
    HALL.save(tmp_path / "maps" / "freedoom_hall.npz")
    return tmp_path


def windows(folder: Path, **options) -> WindowDataset:
    return WindowDataset(
        DataConfig(str(folder), image_size=(32, 32), context_frames=3, max_offset=4, **options), "test"
    )


def eyes(times: list[int], heights: list[float]) -> np.ndarray:
    return np.array([(2 + 0.5 * time, 4, height) for time, height in zip(times, heights, strict=True)])


def same(one: Correspondence, other: Correspondence) -> None:
    for name in ("place", "sight", "surface", "point", "depth"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-9)


def test_windows_know_their_map_their_times_and_how_high_one_stands(dataset):
    """At x = 4.5 one begins to stand on the step at x = 5."""
    goals = windows(dataset)
    known = WindowCorrespondence(goals, (8, 8))
    window = next(i for i in range(len(goals)) if goals.locate(i) == (0, 5))
    geometry = MapGeometry.load(dataset / "maps" / "two_levels.npz")
    times, heights = [7, 3, 4, 5], [2.0, 1.5, 1.5, 1.5]
    poses = eyes(times, heights), 0.05 * np.array(times)
    poses[0][3, 2] = 1.5  # at x = 4.5 the player's edge is at the step and not beyond
    expected = correspondences(geometry, VIEW, poses[0][0], poses[1][0], poses[0][1:], poses[1][1:])
    same(known(window, 2), expected)
    assert known(window, 2).visible.shape == (64, 3)


def test_recorded_heights_are_preferred_and_the_beginning_has_no_past(dataset):
    goals = windows(dataset)
    window = next(i for i in range(len(goals)) if goals.locate(i) == (1, 1))
    seen = WindowCorrespondence(goals, (8, 8))(window, 3)
    times, heights = [4, 0, 0, 1], [1.9, 1.5, 1.5, 1.6]
    poses = eyes(times, heights), 0.05 * np.array(times)
    poses[0][1] = math.nan
    same(seen, correspondences(HALL, VIEW, poses[0][0], poses[1][0], poses[0][1:], poses[1][1:]))
    assert not seen.visible[:, 0].any()
    assert seen.visible[:, 1:].any(0).all()
    with pytest.raises(IndexError, match=r"frames 0 to 7, but 9 was requested"):
        WindowCorrespondence(goals, (8, 8))(window, 8)


def test_datasets_without_what_is_needed_are_refused(dataset):
    np.savez(dataset / "maps" / "two_levels.npz", segments=HALL.segments)
    goals = windows(dataset)
    with pytest.raises(DataError, match=r"two_levels.npz.*delete the folder .*maps and run the recipe"):
        WindowCorrespondence(goals, (8, 8))(0, 1)
    shutil.rmtree(dataset / "maps")
    with pytest.raises(DataError, match=r"two_levels_0000: no walls of its map in .*maps"):
        WindowCorrespondence(goals, (8, 8))
    DatasetInfo("halls").save(dataset)
    with pytest.raises(DataError, match=r"dataset.json has no camera"):
        WindowCorrespondence(windows(dataset), (8, 8))
