from dataclasses import replace

import numpy as np
import pytest
import torch

from cdit.plan.candidates import Prior
from cdit.plan.config import OptimizerConfig
from cdit.plan.noise import coloured_noise
from cdit.plan.optimizers import mppi_weights, optimize

KNOTS = 4
MANY = OptimizerConfig(samples=500, iterations=25, elites=100, smallest_std=0.0, first="gaussian", noise_beta=1.0)


@pytest.fixture
def prior() -> Prior:
    ones = torch.ones(KNOTS, 3)
    return Prior(0 * ones, ones, -5 * ones, 5 * ones, torch.randn(100, KNOTS, 3, generator=torch.manual_seed(3)))


def quadratic(targets: torch.Tensor, matrix: torch.Tensor):
    """(x - c)ᵀ A (x - c) per context, whose minimum is c."""

    def cost(values: torch.Tensor) -> torch.Tensor:
        offset = (values - targets[:, None]).flatten(2)
        return torch.einsum("bsi,ij,bsj->bs", offset, matrix, offset)

    return cost


@pytest.mark.parametrize("name", ["cem", "icem", "mppi"])
@pytest.mark.parametrize("result", ["mean", "best"])
def test_optimisers_reach_the_minimum_of_a_quadratic(name: str, result: str, prior: Prior):
    targets = torch.tensor([0.7, -1.1])[:, None, None].expand(2, KNOTS, 3)
    root = torch.eye(3 * KNOTS) + 0.1 * torch.randn(3 * KNOTS, 3 * KNOTS, generator=torch.manual_seed(0))
    config = replace(MANY, name=name, result=result, temperature=0.1)
    found = optimize(quadratic(targets, root @ root.T), prior, config, 2, torch.manual_seed(1))
    tolerance = {"cem": 0.02, "icem": 0.02, "mppi": 0.15}[name]
    torch.testing.assert_close(found.values, targets, atol=tolerance, rtol=0)


def test_a_minimum_out_of_bounds_ends_at_the_bound(prior: Prior):
    targets = torch.full((1, KNOTS, 3), 2.0)
    bounded = replace(prior, low=-torch.ones(KNOTS, 3), high=torch.ones(KNOTS, 3))
    found = optimize(quadratic(targets, torch.eye(3 * KNOTS)), bounded, MANY, 1, torch.manual_seed(1))
    torch.testing.assert_close(found.values, torch.ones(1, KNOTS, 3), atol=0.01, rtol=0)


def test_the_first_iteration_draws_recorded_motions_and_tries_the_start(prior: Prior):
    config = OptimizerConfig(samples=50, iterations=1, elites=2)
    start = torch.full((1, KNOTS, 3), 0.123)
    found = optimize(lambda values: values.flatten(2).sum(2), prior, config, 1, torch.manual_seed(1), start)
    tried = found.tried[0][0]
    torch.testing.assert_close(tried[0], start[0])
    assert all(any(torch.equal(one, recorded) for recorded in prior.recorded) for one in tried[1:])
    best, cost = found.best()
    assert cost.item() == pytest.approx(tried.flatten(1).sum(1).min().item())
    torch.testing.assert_close(found.values, best)


def test_icem_keeps_the_best_and_ends_with_the_mean_of_the_elites(prior: Prior):
    config = OptimizerConfig("icem", samples=50, iterations=3, elites=10, kept=0.3)
    cost = quadratic(torch.full((2, KNOTS, 3), 0.5), torch.eye(3 * KNOTS))
    found = optimize(cost, prior, config, 2, torch.manual_seed(1))
    rows = torch.arange(2)[:, None]
    elites = [x[rows, costs.argsort(1)[:, :10]] for x, costs in zip(found.tried, found.costs, strict=True)]
    for before, after in zip(elites[:-1], found.tried[1:], strict=True):
        torch.testing.assert_close(after[:, 50:], before[:, :3])
    torch.testing.assert_close(found.tried[2][:, 0], elites[1].mean(1))


@pytest.mark.parametrize("smallest", [0.0, 0.5])
def test_candidates_stay_as_far_apart_as_configured(smallest: float, prior: Prior):
    alike = replace(prior, std=2 * prior.std, recorded=torch.zeros(1, KNOTS, 3))
    config = OptimizerConfig(samples=1000, iterations=2, smallest_std=smallest)
    found = optimize(lambda values: values.flatten(2).sum(2), alike, config, 1, torch.manual_seed(1))
    assert found.tried[1].std(1).mean().item() == pytest.approx(2 * smallest, rel=0.05)


def test_mppi_weighs_by_the_exponential_of_the_cost():
    costs = torch.tensor([[1.0, 2.0, 4.0]])
    scale = 0.3 * np.std([1, 2, 4])
    expected = np.exp(-np.array([1, 2, 4]) / scale)
    np.testing.assert_allclose(mppi_weights(costs, 0.3)[0], expected / expected.sum(), rtol=1e-5)
    torch.testing.assert_close(mppi_weights(costs * 100, 0.3), mppi_weights(costs, 0.3))


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("length", [64, 65])
def test_the_spectrum_of_coloured_noise(beta: float, length: int):
    noise = coloured_noise((4000, length), beta, torch.manual_seed(0)).numpy()
    assert noise.var() == pytest.approx(1, rel=0.05)
    power = (np.abs(np.fft.rfft(noise)) ** 2).mean(0)[1 : length // 2]
    slope = np.polyfit(np.log(np.fft.rfftfreq(length)[1 : length // 2]), np.log(power), 1)[0]
    assert slope == pytest.approx(-beta, abs=0.05)
