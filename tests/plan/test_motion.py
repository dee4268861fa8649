import math

import numpy as np
import pytest
import torch

from cdit.common.motion import between, integrate, placed, wrap
from cdit.plan.candidates import Constant, Prior, Spline
from cdit.plan.errors import path_errors


def matrix(x: float, y: float, yaw: float) -> np.ndarray:
    """SE(2) as a homogeneous matrix."""
    return np.array([[math.cos(yaw), -math.sin(yaw), x], [math.sin(yaw), math.cos(yaw), y], [0, 0, 1]])


def pose(m: np.ndarray) -> list[float]:
    return [m[0, 2], m[1, 2], math.atan2(m[1, 0], m[0, 0])]


def multiplied(actions: np.ndarray) -> np.ndarray:
    now, path = np.eye(3), []
    for step in actions:
        now = now @ matrix(*step)
        path.append(pose(now))
    return np.array(path)


def test_integration_is_the_product_of_matrices():
    actions = np.random.default_rng(0).normal(size=(5, 9, 3))
    found = integrate(torch.tensor(actions))
    for one, path in zip(actions, found.numpy(), strict=True):
        np.testing.assert_allclose(path, multiplied(one), atol=1e-9)


def test_motion_between_poses_and_placing_are_products_too():
    random = np.random.default_rng(1)
    first, second = random.normal(size=(2, 3))
    expected = pose(np.linalg.inv(matrix(*first)) @ matrix(*second))
    np.testing.assert_allclose(between(torch.tensor(first), torch.tensor(second)), expected, atol=1e-9)
    np.testing.assert_allclose(
        placed(torch.tensor([[*second]]), torch.tensor(first))[0], pose(matrix(*first) @ matrix(*second))
    )


def test_constant_motion_ends_where_its_numbers_say():
    dx, dy, turn = 0.3, -0.1, 0.7
    actions = Constant(8).actions(torch.tensor([[dx, dy, turn]]))
    path = multiplied(actions.double().numpy())
    np.testing.assert_allclose(path[:, :2], np.arange(1, 9)[:, None] * [dx, dy], atol=1e-6)
    np.testing.assert_allclose(path[-1, 2], math.atan2(dy, dx) + turn, atol=1e-6)
    np.testing.assert_allclose(path[:-1, 2], math.atan2(dy, dx), atol=1e-6)
    np.testing.assert_allclose(Constant(8).values(actions), [[dx, dy, turn]], atol=1e-5)


def test_splines_interpolate_and_invert():
    spline = Spline(7, 3)
    values = torch.randn(4, 3, 3)
    actions = spline.actions(values)
    torch.testing.assert_close(actions[:, [0, 3, 6]], values)
    torch.testing.assert_close(actions[:, 1], values[:, 0] * 2 / 3 + values[:, 1] / 3)
    torch.testing.assert_close(spline.values(actions), values, atol=1e-4, rtol=0)
    steps = torch.randn(4, 7, 3)
    torch.testing.assert_close(Spline(7, 7).actions(steps), steps)


def test_a_prior_has_the_moments_of_the_data():
    actions = torch.randn(5000, 8, 3) * torch.tensor([0.1, 0.02, 0.3]) + torch.tensor([0.3, 0.0, 0.1])
    prior = Prior.fit(Spline(8, 8), actions)
    torch.testing.assert_close(prior.mean, actions.mean(0), atol=2e-3, rtol=0)
    torch.testing.assert_close(prior.std, actions.std(0), rtol=0.05, atol=0)
    assert (prior.low < prior.mean).all()
    assert (prior.recorded >= prior.low).all()


def test_path_errors_by_hand():
    truth = torch.tensor([[1.0, 0, 0], [2, 0, 0], [3, 0, 0.1]])
    path = torch.tensor([[1.0, 1, 0], [2, 2, 0], [3, 2, -0.1]])
    errors = path_errors(path, truth, spacing=0.5)
    assert errors.ate.item() == pytest.approx(math.sqrt((1 + 4 + 4) / 3) / 0.5)
    assert errors.rpe.item() == pytest.approx(math.sqrt((1 + 0) / 2) / 0.5)  # steps differ by (0, 1) and (0, 0)
    assert errors.metres.item() == pytest.approx(2)
    assert errors.degrees.item() == pytest.approx(math.degrees(0.2), rel=1e-5)


def test_angles_wrap():
    torch.testing.assert_close(
        wrap(torch.tensor([3.5, -3.5, 0.5])), torch.tensor([3.5 - 2 * torch.pi, 2 * torch.pi - 3.5, 0.5])
    )
