import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cdit.batch import Batch, Condition
from cdit.common.errors import UserError
from cdit.data.motion import compose
from cdit.data.windows import WindowDataset
from cdit.evaluate.cases import Case
from cdit.evaluate.protocols import direct, release_actions, rollout
from cdit.world_model import Units

NWM = Units((4 / 15, 0.25, 1.0), (-1 / 3, 0.0, 0.0), time_scale=4 / 128, spacing=0.25)


def rotated(vector: np.ndarray, angle: float) -> np.ndarray:
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) @ vector


def test_direct_goals_are_those_of_the_windows(dataset: WindowDataset):
    protocol = direct([0.5, 2.0, 4.0], 4.0)
    assert protocol.offsets == [2, 8, 16]
    assert protocol.measured == [0, 1, 2]
    trajectory, now = dataset.locate(9)
    expected = dataset.window(9, [2, 8, 16])
    actions = protocol.actions(dataset.info.actions, dataset.trajectories[trajectory], now)
    np.testing.assert_allclose(actions, expected.condition.action, atol=1e-6)
    case, other = Case(9, trajectory, "", now), Case(31, *(lambda t, n: (t, "", n))(*dataset.locate(31)))
    found = protocol.window(dataset, case).named_tensors()
    assert found.keys() == expected.named_tensors().keys()
    for name, value in expected.named_tensors().items():
        torch.testing.assert_close(found[name], value)
    motion = protocol.motion(dataset, other)
    torch.testing.assert_close(motion.action, dataset.window(31, [2, 8, 16]).condition.action)
    assert motion.known.all()


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_rollouts_take_every_nth_frame_and_the_motion_between(dataset: WindowDataset, stride: int):
    protocol = rollout([1.0, 3.0], 4.0 / stride, 4.0)
    assert protocol.offsets == list(range(stride, 13, stride))
    assert [protocol.offsets[i] for i in protocol.measured] == [4, 12]
    trajectory, now = dataset.locate(9)
    actions = protocol.actions(dataset.info.actions, dataset.trajectories[trajectory], now)
    if stride == 1:
        np.testing.assert_allclose(actions, dataset.path(9, 12).condition.action, atol=1e-6)
    for steps in range(1, len(actions) + 1):  # one after the other they lead to each goal
        goal = dataset.window(9, [steps * stride]).condition.action[0].numpy()
        np.testing.assert_allclose(compose(actions[:steps])[-1], goal, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 4])
def test_the_release_s_actions_derived_step_by_step(dataset: WindowDataset, stride: int):
    """Normalise all way points, take differences frame by frame, add them up over the stride."""
    trajectory, now = dataset.locate(3)
    walk = dataset.trajectories[trajectory]
    way, last = [], np.zeros(3)
    for time in range(now + 1, now + 13):
        ahead = rotated(walk.position[time] - walk.position[now], -walk.yaw[now]) / 0.25
        lowest, highest = np.array([-2.5, -4]), np.array([5, 4])
        way.append([*(2 * (ahead - lowest) / (highest - lowest) - 1), walk.yaw[time] - walk.yaw[now]])
    deltas = []
    for point in np.array(way):
        deltas.append(point - last)
        last = point
    expected = np.array(deltas).reshape(-1, stride, 3).sum(axis=1)
    expected[:, 2] = np.arctan2(np.sin(expected[:, 2]), np.cos(expected[:, 2]))

    protocol = rollout([3.0], 4.0 / stride, 4.0, release=(NWM, 1.0))
    physical = torch.from_numpy(protocol.actions(dataset.info.actions, walk, now))[None]
    found = NWM.normalize(physical)
    np.testing.assert_allclose(found[0], expected, atol=1e-12)
    # What tells it from training: at rest it would be -1/3 in every step there, here only in the first.
    rest = torch.from_numpy(release_actions(np.zeros((3, 3)), NWM, 1.0))[None]
    np.testing.assert_allclose(NWM.normalize(rest)[0, :, 0], [-1 / 3, 0, 0], atol=1e-12)


def test_the_release_s_actions_of_units_without_a_spacing_of_their_own():
    way = np.array([[0.5, 0.1, 3.0], [0.8, 0.1, -3.1], [1.0, -0.3, -3.0]])
    units = Units(NWM.action_scale, NWM.action_offset, spacing=None)
    np.testing.assert_allclose(release_actions(way, units, 0.25), release_actions(way, NWM, 99.0))
    yaw = release_actions(way, units, 0.25)[:, 2]
    np.testing.assert_allclose(yaw, [3.0, 2 * math.pi - 6.1, 0.1], atol=1e-12)


@pytest.mark.parametrize("release", [None, (NWM, 1.0)])
def test_only_rollouts_by_the_release_s_conventions_encode_their_frames_again(release):
    asked = []

    def rollout_of_a_world(context: torch.Tensor, condition: Condition, **options) -> torch.Tensor:
        asked.append(options["reencode"])
        return condition.action

    frames = torch.zeros(2, 3, 3, 4, 4, dtype=torch.uint8)
    condition = Condition(action=torch.zeros(2, 3, 3), known=torch.ones(2, 3, dtype=torch.bool))
    batch = Batch(frames, torch.ones(2, 3, dtype=torch.bool), frames, condition)
    world = SimpleNamespace(rollout=rollout_of_a_world)
    rollout([1.0], 4.0, 4.0, release).predict(world, batch, None, torch.Generator())
    assert asked == [release is not None]


@pytest.mark.parametrize("rate", [3.0, 8.0, 1.5])
def test_rates_that_do_not_divide_the_model_s(rate: float):
    with pytest.raises(UserError, match=rf"rollout.fps is {rate:g}, .* 4 frames"):
        rollout([2.0], rate, 4.0)


def test_horizons_between_frames():
    with pytest.raises(UserError, match=r"time.seconds: 0.3 s"):
        direct([1.0, 0.3], 4.0)
    with pytest.raises(UserError, match=r"rollout.seconds: 0.5 s .* at 1 frames per second"):
        rollout([0.5, 2.0], 1.0, 4.0)
