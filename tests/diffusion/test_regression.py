"""Regression against closed forms."""

import pytest
import torch
from torch import nn

from cdit.batch import EncodedBatch, KeyedDraws
from cdit.common.errors import UserError
from cdit.diffusion import Regression, SamplerConfig, check_sampler


class Linear(nn.Module):
    """w · the last past frame + b, whatever the noisy input; it records what it is called with."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, noisy, timestep, condition, context, *rest):
        self.calls.append((noisy, timestep))
        return self.weight * context[:, -1:] + self.bias + noisy


def batch(count: int = 64) -> EncodedBatch:
    draws = torch.Generator().manual_seed(0)
    context = torch.randn(count, 3, 2, 4, 4, generator=draws)
    clean = 0.7 * context[:, -1:] - 0.2 + 0.5 * torch.randn(count, 1, 2, 4, 4, generator=draws)
    return EncodedBatch(context, None, clean, {"time_shift": torch.ones(count, 1)})


def test_training_finds_the_least_squares():
    network, objective, data = Linear(), Regression(), batch()
    draws = KeyedDraws(range(64), "cpu")
    optimizer = torch.optim.LBFGS(network.parameters(), max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = objective.loss(network, data, draws).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    inputs = torch.stack((data.context[:, -1:].flatten(), torch.ones(data.clean.numel())), dim=1)
    solution = torch.linalg.lstsq(inputs, data.clean.flatten()[:, None]).solution.flatten()
    torch.testing.assert_close(torch.stack((network.weight, network.bias)), solution, atol=1e-4, rtol=1e-4)
    losses = objective.loss(network, data, draws)
    expected = (0.0 + network(torch.zeros(()), None, {}, data.context) - data.clean).square().mean((2, 3, 4))
    torch.testing.assert_close(losses, expected)


def test_no_noise_and_no_time_reach_the_network():
    network, objective = Linear(), Regression()
    for time in (None, torch.full((64, 1), 0.3)):
        objective.loss(network, batch(), KeyedDraws(range(64), "cpu"), time)
    assert all(not noisy.any() and bool((timestep == 1000).all()) for noisy, timestep in network.calls)


def test_one_call_samples_what_was_trained():
    network, data = Linear(), batch(5)
    network.weight.data.fill_(0.5)

    def predict(noisy, timestep):
        return network(noisy, timestep, {}, data.context)

    sampled = Regression().sample(predict, torch.randn_like(data.clean), SamplerConfig("direct", 1))
    assert len(network.calls) == 1
    torch.testing.assert_close(sampled, 0.5 * data.context[:, -1:])


def test_other_samplers_are_refused():
    check_sampler("regression", SamplerConfig("direct", 1))
    with pytest.raises(UserError, match=r"sampler\.scheduler is euler, expected one of direct"):
        check_sampler("regression", SamplerConfig())
    with pytest.raises(UserError, match=r"sampler\.steps is 8, expected 1"):
        check_sampler("regression", SamplerConfig("direct"))


def test_guidance_extrapolates():
    unknown, known = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0])
    torch.testing.assert_close(Regression().guide(unknown, known, 2.5), torch.tensor([3.5, -3.0]))
