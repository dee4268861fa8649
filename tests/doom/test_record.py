import math
from dataclasses import replace

import numpy as np
import pytest

from cdit.common.errors import UserError
from cdit.doom.engine import FPS, Observation
from cdit.doom.record import STILL_FRAMES, is_discontinuous, is_still, record, sees_void


@pytest.fixture(scope="module")
def walk(maze, maze_geometry):
    return record(maze, maze_geometry, np.random.default_rng(0), length=200, min_length=100)


HERE = Observation(np.zeros((8, 8, 3), np.uint8), np.full((8, 8), 2.0, np.float32), np.zeros(2), 0.0, 1.5)


def test_teleports_are_discontinuous_but_walks_are_not():
    assert not is_discontinuous(HERE, replace(HERE, position=np.array([0.5, 0.0])), turn=0.0)
    assert is_discontinuous(HERE, replace(HERE, position=np.array([1.0, 0.0])), turn=0.0)
    assert not is_discontinuous(HERE, replace(HERE, yaw=2 * math.pi - 0.25), turn=-1.0)
    assert is_discontinuous(HERE, replace(HERE, yaw=1.0), turn=0.0)


def test_staying_in_place_is_noticed():
    assert not is_still([HERE] * STILL_FRAMES)
    assert is_still([HERE] * (STILL_FRAMES + 1))
    assert not is_still([replace(HERE, position=np.array([0.1 * i, 0.0])) for i in range(STILL_FRAMES + 1)])


def test_sky_below_is_noticed():
    depth = HERE.depth.copy()
    depth[:6] = 50.0
    assert not sees_void(replace(HERE, depth=depth))
    depth[6:, :5] = 50.0
    assert sees_void(replace(HERE, depth=depth))


def test_walks_keep_moving_at_walking_speed(walk):
    speed = np.linalg.norm(np.diff(walk.position, axis=0), axis=1) * FPS
    assert 0.7 < speed.mean() < 1.6
    assert speed.max() < 2.2
    assert (speed < 0.1).mean() < 0.25
    assert np.ptp(walk.position, axis=0).max() > 5.0


def test_walks_turn_at_varied_speed(walk):
    rates = np.abs(np.degrees(np.diff(walk.yaw))) * FPS
    assert rates.max() < 95
    assert np.percentile(rates, 20) < 15 < 40 < np.percentile(rates, 90)


def test_walks_do_not_stare_at_walls(walk):
    assert (walk.depth[:, 40:56, 40:56].mean((1, 2)) < 1.0).mean() < 0.12


def test_walks_stay_among_the_walls(walk, maze_geometry):
    assert all(maze_geometry.sector_at(position) is not None for position in walk.position)


def test_a_map_without_room_to_walk_ends_in_an_error(maze, maze_geometry, monkeypatch):
    monkeypatch.setattr("cdit.doom.record.ATTEMPTS", 2)
    monkeypatch.setattr("cdit.doom.record._walk", lambda *_: [HERE])
    with pytest.raises(UserError, match=r"my_way_home: no walk of min_length \(100\) frames in 2 attempts"):
        record(maze, maze_geometry, np.random.default_rng(0), length=200, min_length=100)
