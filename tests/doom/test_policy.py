import math

import numpy as np
import pytest

from cdit.doom.engine import FPS, Observation, camera
from cdit.doom.policy import Command, ExploringPolicy, PolicyConfig, free_distance, open_direction

FOV = camera(64).horizontal_fov
TAN = math.tan(FOV / 2)


def observation(depth: np.ndarray, position: tuple[float, float] = (0.0, 0.0)) -> Observation:
    return Observation(np.zeros((64, 64, 3), np.uint8), depth.astype(np.float32), np.array(position), 0.0, 1.5)


def room(left: float, right: float) -> np.ndarray:
    """Depth that grows evenly from the left edge to the right edge of the picture."""
    return np.broadcast_to(np.linspace(left, right, 64), (64, 64))


def walk(depth: np.ndarray, frames: int, seed: int = 0, moves: bool = True, **config) -> list[Command]:
    policy = ExploringPolicy(FOV, np.random.default_rng(seed), PolicyConfig(**config))
    commands, x = [], 0.0
    for _ in range(frames):
        commands.append(policy(observation(depth, (x, 0.0))))
        x += commands[-1].forward / FPS if moves else 0.0
    return commands


def test_same_observations_and_seed_give_the_same_commands():
    depth = room(2, 6)
    assert walk(depth, 50, seed=3) == walk(depth, 50, seed=3)
    assert walk(depth, 50, seed=3) != walk(depth, 50, seed=4)


def test_walks_at_walking_speed_where_it_is_open():
    commands = walk(room(9, 9), 400, stand_share=0.0)
    assert all(1.0 <= c.forward <= 1.8 for c in commands)
    assert np.std([c.forward for c in commands]) > 0.1
    assert abs(np.mean([c.turn for c in commands])) < math.radians(5)


def test_stands_and_looks_around_now_and_then():
    speeds = np.array([c.forward for c in walk(room(9, 9), 1000, stand_share=0.2)])
    assert 0.01 < (speeds == 0).mean() < 0.3


@pytest.mark.parametrize(("left", "right", "sign"), [(8, 2, 1), (2, 8, -1)])
def test_steers_into_the_open(left, right, sign):
    turns = [c.turn for c in walk(room(left, right), 100, stand_share=0.0)]
    assert sign * np.mean(turns) > math.radians(3)


@pytest.mark.parametrize("seed", range(5))
def test_turns_away_from_a_wall_and_slows_down(seed):
    commands = walk(room(0.7, 0.7), 8, seed)
    assert all(c.forward < 0.1 for c in commands)
    assert abs(np.sum([c.turn for c in commands])) / FPS > math.radians(45)
    assert len({np.sign(c.turn) for c in commands}) == 1, "turned to and fro in front of the wall"


def test_a_turn_away_goes_on_until_the_way_is_clear():
    policy = ExploringPolicy(FOV, np.random.default_rng(0), PolicyConfig(wobble=0.0, stand_share=0.0))
    turns = [policy(observation(room(1.0, 1.0))).turn for _ in range(10)]
    turns += [policy(observation(room(9.0, 9.0), (0.3 * i, 0.0))).turn for i in range(10)]
    assert abs(turns[9]) > math.radians(30)
    assert np.abs(turns[-5:]).max() < 0.01


def test_turns_when_it_wants_to_walk_and_gets_nowhere():
    turns = [abs(c.turn) for c in walk(room(9, 9), 12, moves=False, stand_share=0.0, wobble=0.0)]
    assert max(turns[:2]) < 0.01
    assert max(turns) > math.radians(30)


def test_yaw_rate_is_bounded_and_smooth():
    config = PolicyConfig()
    policy, rng = ExploringPolicy(FOV, np.random.default_rng(1), config), np.random.default_rng(2)
    turns = np.array([policy(observation(room(*rng.uniform(0.3, 9, 2)))).turn for _ in range(500)])
    assert np.abs(turns).max() <= config.evade_speed[1] + 1e-9
    assert np.abs(np.diff(turns)).max() <= config.turn_acceleration / FPS + 1e-9
    assert np.std(np.abs(turns)) > math.radians(10)


def test_doors_are_tried_once_and_waited_for():
    commands = walk(room(1.0, 1.0), 6, door_share=1.0)
    assert [c.use for c in commands] == [True, False, False, False, False, False]
    assert all(c.turn == 0 for c in commands)
    assert not any(c.use for c in walk(room(1.0, 1.0), 50, door_share=0.0))


def test_free_distance_is_along_the_ray_and_counter_clockwise():
    angles, free = free_distance(np.full((64, 64), 2.0), TAN)
    assert angles[0] == pytest.approx(-angles[-1])
    assert angles[0] == pytest.approx(math.atan(TAN * 63 / 64))
    np.testing.assert_allclose(free * np.cos(angles), 2.0)


def test_open_direction_heeds_ones_width():
    angles, _ = free_distance(np.ones((64, 64)), TAN)
    slit, gap = np.full(64, 1.0), np.full(64, 1.0)
    slit[10:14] = gap[2:26] = 6.0
    assert open_direction(angles, slit) == pytest.approx(0.0, abs=1e-6)
    assert open_direction(angles, gap) > math.radians(5)
