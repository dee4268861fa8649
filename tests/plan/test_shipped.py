"""The goal network that ships with the world `maze`, on frames of walks it was not trained on."""

import numpy as np
import pytest
import torch
from torchmetrics.functional import spearman_corrcoef

from cdit.common.frames import to_float
from cdit.common.motion import integrate
from cdit.data.config import DataConfig
from cdit.data.motion import local_motion
from cdit.data.windows import WindowDataset
from cdit.plan.goal_network import GoalNetwork, load_goal_network
from cdit.worlds import starts_of


@pytest.fixture(scope="module")
def network() -> GoalNetwork:
    return load_goal_network("maze")


@pytest.fixture(scope="module")
def walks() -> WindowDataset:
    return WindowDataset(DataConfig(starts_of("maze"), image_size=(64, 64)), "test")


@pytest.fixture(scope="module")
def pairs(walks: WindowDataset) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Frames, later frames of the same walk, and the motion between them."""
    found = []
    for index, walk in enumerate(walks.trajectories):
        frames = to_float(walks.frames.read(index, list(range(len(walk)))))
        for now in range(len(walk)):
            for goal in range(now, len(walk)):
                motion = local_motion(walk.position[now], walk.yaw[now], walk.position[goal], walk.yaw[goal])
                found.append((frames[now], frames[goal], motion))
    frames, goals, motion = zip(*found, strict=True)
    return torch.stack(frames), torch.stack(goals), np.stack(motion)


def test_distances_follow_the_true_ones(network: GoalNetwork, pairs: tuple):
    frames, goals, motion = pairs
    with torch.no_grad():
        found = network(frames, goals)
    motion = torch.from_numpy(motion).float()
    assert spearman_corrcoef(found.metres(), motion[:, :2].norm(dim=1)) > 0.85
    assert spearman_corrcoef(found.turn(), motion[:, 2].abs()) > 0.9


def test_arrival_is_recognised(network: GoalNetwork, pairs: tuple, walks: WindowDataset):
    frames, goals, motion = pairs
    likely = network.arrival(frames, goals).numpy()
    metres, degrees = np.linalg.norm(motion[:, :2], axis=1), np.degrees(np.abs(motion[:, 2]))
    there, away = (metres < 0.2) & (degrees < 12), (metres > 1) | (degrees > 60)
    assert there.sum() > 50
    assert away.sum() > 50
    assert (likely[there] > 0.5).mean() > 0.9
    assert (likely[away] > 0.5).mean() < 0.1
    firsts = torch.cat([to_float(walks.frames.read(index, [0])) for index in range(len(walks.trajectories))])
    others = network.arrival(firsts, firsts.roll(1, 0))
    assert others.max() < 0.5


def test_proposals_lead_to_the_goal(network: GoalNetwork, pairs: tuple):
    frames, goals, motion = pairs
    mean, _ = network.propose(frames, goals)
    ends = integrate(mean)[:, -1].numpy()
    error = np.linalg.norm(ends[:, :2] - motion[:, :2], axis=1)
    assert error.mean() < 0.5 * np.linalg.norm(motion[:, :2], axis=1).mean()
    assert np.corrcoef(ends[:, 2], motion[:, 2])[0, 1] > 0.7
