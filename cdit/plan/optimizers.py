"""Optimisers of candidates: CEM, iCEM, MPPI, and the best of a list.

Suffixes: B contexts, which are planned for independently, S candidates of each, K knots, D numbers of an action.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cdit.plan.candidates import Prior
from cdit.plan.config import OptimizerConfig
from cdit.plan.noise import coloured_noise

Objective = Callable[[Tensor], Tensor]
"""Costs (B, S) of candidates' parameters (B, S, K, D); lower is better."""


@dataclass
class Solution:
    """What an optimiser found."""

    values: Tensor
    """(B, K, D), the result."""
    tried: list[Tensor] = field(default_factory=list)
    """The candidates of each iteration, (B, S, K, D)."""
    costs: list[Tensor] = field(default_factory=list)
    """Their costs, (B, S)."""

    def best(self) -> tuple[Tensor, Tensor]:
        """The best of all candidates, (B, K, D), and its cost, (B,)."""
        costs = torch.cat(self.costs, dim=1)
        index = costs.argmin(1)
        return take(torch.cat(self.tried, dim=1), index[:, None])[:, 0], costs.gather(1, index[:, None])[:, 0]


def optimize(
    objective: Objective,
    prior: Prior,
    config: OptimizerConfig,
    batch: int,
    generator: torch.Generator,
    start: Tensor | None = None,
    proposed: Tensor | None = None,
) -> Solution:
    """Searches for the parameters of lowest cost.

    Args:
        objective: the cost.
        prior: of the candidates, which stay within its bounds.
        config: the optimiser and its settings.
        batch: B.
        generator: draws the candidates.
        start: (B, K, D), an earlier plan to continue (a warm start): the mean of the first iteration, and one of its
            candidates.
        proposed: (B, P, K, D), further candidates of the first iteration, in place of as many others.
    """
    knots, numbers = prior.mean.shape
    mean = prior.mean.expand(batch, knots, numbers) if start is None else start
    std = prior.std.expand(batch, knots, numbers)
    solution, kept = Solution(mean), None
    for iteration in range(config.iterations):
        if iteration == 0 and config.first == "data":
            index = torch.randint(len(prior.recorded), (batch, config.samples), generator=generator)
            values = prior.recorded[index.to(prior.recorded.device)]
        else:
            beta = 0.0 if config.name in ("cem", "best") else config.noise_beta
            noise = coloured_noise((batch, config.samples, numbers, knots), beta, generator).transpose(-1, -2).to(mean)
            values = (mean[:, None] + std[:, None] * noise).clamp(prior.low, prior.high)
        if iteration == 0 and start is not None:
            values[:, 0] = start
        if iteration == 0 and proposed is not None:
            values[:, -proposed.shape[1] :] = proposed
        if iteration > 0 and config.name == "icem":
            values = torch.cat((values, kept), dim=1)
            if iteration == config.iterations - 1:
                values[:, 0] = mean
        costs = objective(values)
        solution.tried.append(values)
        solution.costs.append(costs)
        if config.name == "mppi":
            weight = mppi_weights(costs, config.temperature)[..., None, None]
            mean = (weight * values).sum(1)
            std = (weight * (values - mean[:, None]).square()).sum(1).sqrt()  # Hansen et al. 2022, arXiv 2203.04955
        else:
            elites = take(values, costs.topk(config.elites, dim=1, largest=False).indices)
            mean, std = elites.mean(1), elites.std(1)
            kept = elites[:, : round(config.kept * config.elites)]
        std = torch.maximum(std, config.smallest_std * prior.std)
    returns_mean = config.name in ("cem", "mppi") and config.result == "mean"
    solution.values = mean if returns_mean else solution.best()[0]
    return solution


def mppi_weights(costs: Tensor, temperature: float) -> Tensor:
    """Weights (B, S) of candidates, exp(-cost / λ) normalised, with λ = temperature · standard deviation of the costs.

    Williams et al. 2017, "Information theoretic MPC for model-based reinforcement learning". The deviation makes λ
    independent of the unit of the cost.
    """
    scale = temperature * costs.std(1, keepdim=True, correction=0).clamp(min=1e-12)
    return torch.softmax(-costs / scale, dim=1)


def take(values: Tensor, index: Tensor) -> Tensor:
    """Candidates (B, S, K, D) at the indices (B, E): (B, E, K, D)."""
    return values[torch.arange(len(values), device=values.device)[:, None], index]
