"""What an evaluation is built of."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cdit.common.errors import DataError, Interrupted
from cdit.data.action_space import ActionSpace
from cdit.data.windows import WindowDataset
from cdit.evaluate.config import EvaluateConfig, RolloutConfig, TimeConfig
from cdit.evaluate.evaluation import build_studies, waiting
from cdit.nwm.normalization import normalization
from cdit.world_model import WorldModel


def test_compatible_rollouts_are_in_the_spacings_of_the_dataset(
    world: Callable[[], WorldModel], dataset: WindowDataset
):
    """The release's numbers of a path, from its own description, in units of the walks' 0.25 m."""
    world = world()
    world.description.units = normalization()
    config = EvaluateConfig(checkpoint="", data="", out="", protocols=["rollout"], nwm_compat=True)
    config.rollout = RolloutConfig(seconds=[1.0], fps=[4.0], samples=2)
    (study,) = build_studies(config, world, dataset)
    trajectory, now = dataset.trajectories[study.cases[0].trajectory], study.cases[0].now
    heading = np.exp(-1j * trajectory.yaw[now])
    path = trajectory.position[now : now + 5] @ np.array([1, 1j])
    local = (path[1:] - path[0]) * heading / 0.25
    points = np.stack([(local.real + 2.5) / 7.5 * 2 - 1, local.imag / 4], axis=1)
    expected = np.diff(points, axis=0, prepend=[[0.0, 0.0]])

    actions = study.protocol.actions(ActionSpace(), trajectory, now)
    units = world.description.units
    found = actions / np.array([0.25, 0.25, 1]) * units.action_scale + units.action_offset
    np.testing.assert_allclose(found[:, :2], expected, atol=1e-9)


def test_an_index_may_not_ask_for_a_shorter_past_than_the_model_knows(
    world: Callable[[], WorldModel], dataset: WindowDataset, tmp_path: Path
):
    world = world()
    (tmp_path / "time.pkl").write_bytes(pickle.dumps([("a", 1, 0, 4)]))
    config = EvaluateConfig(checkpoint="", data="", out="", protocols=["time"])
    config.time = TimeConfig(seconds=[1.0], index=str(tmp_path / "time.pkl"))
    world.description.min_history = 2
    assert [case.now for case in build_studies(config, world, dataset)[0].cases] == [1]
    world.description.min_history = 3
    with pytest.raises(DataError, match=r"time\.pkl"):
        build_studies(config, world, dataset)


def test_an_error_of_this_process_is_not_blamed_on_another():
    with pytest.raises(RuntimeError, match="Error\\(s\\) in loading state_dict"), waiting():
        torch.nn.Linear(2, 2).load_state_dict({})
    with pytest.raises(Interrupted, match="another process does not answer"), waiting():
        raise torch.distributed.DistNetworkError("connection reset")
