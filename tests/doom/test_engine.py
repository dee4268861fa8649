import math
from pathlib import Path

import numpy as np
import pytest

from cdit.common.errors import UserError
from cdit.doom import engine as engine_module
from cdit.doom.engine import EYE_HEIGHT, FPS, UNITS_PER_METRE, Engine, camera
from cdit.doom.geometry import distance_to_segments

ROOM = (464 / UNITS_PER_METRE, -176 / UNITS_PER_METRE)
"""The middle of the maze's room of 5 by 5 metres."""


def test_unknown_map_is_refused():
    with pytest.raises(UserError, match="my_way_home"):
        Engine("nowhere", 64)


def test_missing_vizdoom_says_what_to_install(monkeypatch):
    monkeypatch.setattr(engine_module, "vizdoom", None)
    with pytest.raises(UserError, match=r"pip install 'cdit\[doom\]'"):
        Engine("my_way_home", 64)


def test_leaves_nothing_where_it_is_started(tmp_path, monkeypatch):
    pytest.importorskip("vizdoom", reason="Doom needs ViZDoom")
    monkeypatch.chdir(tmp_path)
    with Engine("my_way_home", 64) as engine:
        engine.reset(0)
        engine.step(forward=0, left=0, turn=0)
    assert Path.cwd() == tmp_path
    assert not list(tmp_path.iterdir())


def test_walking_at_yaw_0_grows_x(maze):
    before = maze.reset(0, *ROOM, yaw=0.0)
    after = maze.step(forward=1.5, left=0, turn=0)
    assert abs(math.remainder(before.yaw, 2 * math.pi)) < 1e-3
    assert after.position[0] - before.position[0] > 0.1
    assert abs(after.position[1] - before.position[1]) < 1e-3


def test_strafing_left_at_yaw_0_grows_y(maze):
    before = maze.reset(0, *ROOM, yaw=0.0)
    after = maze.step(forward=0, left=0.8, turn=0)
    assert after.position[1] - before.position[1] > 0.05
    assert abs(after.position[0] - before.position[0]) < 1e-3


def test_turning_counter_clockwise_grows_yaw(maze):
    before = maze.reset(0, *ROOM, yaw=1.0)
    assert before.yaw == pytest.approx(1.0, abs=1e-3)
    after = maze.step(0, 0, turn=0.5)
    assert after.yaw - before.yaw == pytest.approx(0.5 / FPS, rel=0.1)


def test_four_frames_take_35_tics(maze):
    before = maze.reset(0, *ROOM, yaw=0.0)
    for _ in range(FPS):
        after = maze.step(0, 0, turn=math.radians(60))
    assert after.yaw - before.yaw == pytest.approx(math.radians(60), rel=5e-3)


@pytest.mark.parametrize("speed", [0.8, 1.2, 1.5])
def test_steady_speed_is_the_commanded_one(maze, speed):
    maze.reset(0, 13.0, 48 / UNITS_PER_METRE, yaw=0.0)
    for _ in range(4):
        before = maze.step(speed, 0, 0)
    for _ in range(4):
        after = maze.step(speed, 0, 0)
    assert np.linalg.norm(after.position - before.position) == pytest.approx(speed, rel=0.04)


def test_frame_and_pose_are_of_the_same_instant(maze):
    """A picture taken in full motion equals one taken later at rest from the pose recorded with it."""
    maze.reset(0, *ROOM, yaw=2.0)
    turning = maze.step(0, 0, turn=1.2)
    at_rest = maze.step(0, 0, 0)
    assert turning.yaw == at_rest.yaw
    np.testing.assert_array_equal(turning.frame, at_rest.frame)

    maze.reset(0, *ROOM, yaw=0.0)
    maze.step(0, 1.5, 0)
    strafing = maze.step(0, 1.5, 0)
    errors = {}
    for tics_late in (-1, 0, 1):
        y = strafing.position[1] + tics_late * 1.5 / 35
        still = maze.reset(0, strafing.position[0], y, yaw=0.0)
        errors[tics_late] = np.abs(still.frame.astype(float) - strafing.frame).mean()
    assert min(errors, key=errors.get) == 0


@pytest.mark.parametrize("degrees", [4.0, -7.0])
def test_a_pure_turn_moves_the_picture_as_a_pinhole_camera_does(degrees):
    """x' = f tan(atan(x / f) + turn), with f of the camera; a focal length 8 % off fits worse."""
    pytest.importorskip("vizdoom", reason="the engine is part of the extra 'doom'")
    with Engine("my_way_home", 384) as engine:
        before = engine.reset(0, *ROOM, yaw=0.6)
        after = engine.step(0, 0, math.radians(degrees) * 35 / 8)  # the first frame takes 8 tics
    turn = after.yaw - before.yaw
    assert turn == pytest.approx(math.radians(degrees), abs=1e-3)
    row = slice(188, 196)
    columns = np.arange(384) + 0.5 - 192
    old, new = before.frame[row].mean((0, 2)), after.frame[row].mean((0, 2))

    def error(focal_length: float) -> float:
        source = focal_length * np.tan(np.arctan(columns / focal_length) - turn)
        inside = np.abs(source) < 185
        return float(np.abs(np.interp(source[inside], columns, old) - new[inside]).mean())

    focal_length = camera(384).focal_length
    assert focal_length == pytest.approx(256)
    assert error(focal_length) < 0.5 * min(error(0.92 * focal_length), error(1.08 * focal_length))


def test_floor_is_eye_height_below_the_camera(maze):
    """Depth on the floor is eye_height * f / row: the vertical focal length equals the horizontal one."""
    seen = maze.reset(0, 13.5, 48 / UNITS_PER_METRE, yaw=0.0)  # looks along a corridor
    rows = np.arange(70, 96)
    expected = EYE_HEIGHT * camera(96).focal_length / (rows + 0.5 - 48)
    np.testing.assert_allclose(seen.depth[rows, 48], expected, atol=0.25)
    assert camera(96).eye_height == EYE_HEIGHT


def test_depth_matches_the_walls(maze, maze_geometry):
    for yaw in (0.0, math.pi / 2, math.pi):
        seen = maze.reset(0, 14.0, -176 / UNITS_PER_METRE, yaw=yaw)
        ahead = seen.position + seen.depth[47, 47] * np.array([math.cos(yaw), math.sin(yaw)])
        assert distance_to_segments(ahead, maze_geometry.segments).min() < 0.25


def test_neither_hud_nor_weapon_is_drawn(maze):
    """A hand or a bar would stay in place while the picture turns."""
    frames = [maze.reset(0, *ROOM, yaw=yaw).frame for yaw in np.arange(8) * math.pi / 4]
    assert (np.ptp(np.stack(frames).astype(int), axis=0).max(-1) > 0).mean() > 0.95
    lowest = np.stack(frames)[:, -12:].astype(int)
    assert (np.ptp(lowest, axis=0).max(-1) > 0).mean() > 0.9


def test_items_are_left_alone(maze):
    """The maze ends where its armour is picked up; here one walks over it."""
    maze.reset(0, 1040 / UNITS_PER_METRE, -300 / UNITS_PER_METRE, yaw=-math.pi / 2)
    assert all(maze.step(1.5, 0, 0) is not None for _ in range(12))


def test_everything_follows_from_the_seed(maze):
    def episode(seed: int) -> list:
        seen = [maze.reset(seed)]
        return seen + [maze.step(1.2, 0.1, 0.8) for _ in range(6)]

    first, other, again = episode(5), episode(6), episode(5)
    assert all(np.array_equal(a.frame, b.frame) for a, b in zip(first, again, strict=True))
    assert all(np.array_equal(a.position, b.position) and a.yaw == b.yaw for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[-1].frame, other[-1].frame)


def test_frames_have_the_asked_size(maze):
    seen = maze.reset(0)
    assert seen.frame.shape == (96, 96, 3)
    assert seen.frame.dtype == np.uint8
    assert seen.depth.shape == (96, 96)
    assert seen.depth.dtype == np.float32
