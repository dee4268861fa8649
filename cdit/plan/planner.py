"""Plans: an optimiser searches a family of candidates for the one that a world scores best.

Suffixes: B contexts, S candidates of each, H steps, K numbers of an action (3 for motion).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cdit.common.motion import integrate
from cdit.plan.candidates import Family, Prior, make_family
from cdit.plan.config import PlannerConfig
from cdit.plan.constraints import PROJECTIONS, Penalty
from cdit.plan.costs import Cost, Predicted, load_cost
from cdit.plan.goal_network import GoalNetwork
from cdit.plan.optimizers import optimize
from cdit.plan.prediction import Predictor
from cdit.world_model import WorldModel, WorldState

Score = Callable[[Tensor], Tensor]
"""Costs (B, S, L) of candidates (B, S, H, K) after each of L moments; lower is better."""


@dataclass
class Plan:
    """The chosen steps for B contexts, and all candidates that were tried."""

    actions: Tensor
    """(B, H, K)."""
    length: Tensor
    """(B,) steps after which the plan is closest to the goal."""
    lowest: Tensor
    """(B,) lowest cost of any candidate, without penalty."""
    tried: list[Tensor] = field(default_factory=list)
    """The candidates of each iteration, (B, S, H, K)."""
    costs: list[Tensor] = field(default_factory=list)
    """Their costs, (B, S)."""


@dataclass
class Planner:
    """Finds the steps of lowest cost for any score."""

    family: Family
    prior: Prior
    config: PlannerConfig

    @classmethod
    def fit(cls, config: PlannerConfig, actions: Tensor, device: torch.device | str = "cpu") -> "Planner":
        """A planner whose candidates resemble recorded steps (N, H, K)."""
        family = make_family(config.candidates, actions.shape[1], config.knots)
        return cls(family, Prior.fit(family, actions).to(device), config)

    @property
    def moments(self) -> list[int]:
        """The steps after which the distance to the goal counts."""
        return sorted(self.config.frames) or [self.family.horizon]

    def project(self, actions: Tensor) -> Tensor:
        """Steps (…, H, K) that obey the constraint."""
        projection = PROJECTIONS.get(self.config.constraint)
        return actions if projection is None else projection(actions)

    def plan(
        self,
        score: Score,
        batch: int,
        generator: torch.Generator,
        start: Tensor | None = None,
        penalty: Penalty | None = None,
        proposed: Tensor | None = None,
    ) -> Plan:
        """The best steps.

        Args:
            score: costs at `moments`.
            batch: B.
            generator: draws the candidates.
            start: (B, H, K), steps to continue from.
            penalty: added to the costs.
            proposed: (B, P, H, K), steps whose closest candidates are tried in the first iteration.
        """
        low, high = self.prior.low, self.prior.high
        started, proposals = (x if x is None else self.family.values(x).clamp(low, high) for x in (start, proposed))
        lowest = []

        def objective(values: Tensor) -> Tensor:
            actions = self.project(self.family.actions(values))
            costs = score(actions)
            lowest.append(costs.amin((1, 2)))
            return _total(costs, actions, penalty)

        found = optimize(objective, self.prior, self.config.optimizer, batch, generator, started, proposals)
        actions = self.project(self.family.actions(found.values))
        moments = torch.tensor(self.moments, device=actions.device)
        length = moments[score(actions[:, None])[:, 0].argmin(1)] if len(moments) > 1 else moments.expand(batch)
        tried = [self.project(self.family.actions(values)) for values in found.tried]
        return Plan(actions, length, torch.stack(lowest).min(0).values, tried, found.costs)

    def rank(self, score: Score, actions: Tensor, penalty: Penalty | None = None) -> Plan:
        """The best of given steps (B, S, H, K), which the constraint may change; score and penalty as in `plan`."""
        actions = self.project(actions)
        costs = score(actions)
        total = _total(costs, actions, penalty)
        rows, best = torch.arange(len(actions), device=costs.device), total.argmin(1)
        length = torch.tensor(self.moments, device=costs.device)[costs[rows, best].argmin(1)]
        return Plan(actions[rows, best], length, costs.amin((1, 2)), [actions], [total])


@dataclass
class WorldScore:
    """Scores candidates by the frames that a world predicts along them.

    The past and the noise are fixed by the score, so that every iteration sees the same world.
    """

    predictor: Predictor
    cost: Cost
    repeats: int = 1
    """Predictions of each candidate; their costs are averaged."""

    @classmethod
    def of(cls, world: WorldModel, config: PlannerConfig, moments: list[int], cost: Cost | None = None) -> "WorldScore":
        """The score of a config.

        Args:
            world: predicts the frames.
            config: how they are predicted and compared.
            moments: the steps after which frames are compared.
            cost: an existing instance of the config's cost.

        Raises:
            UserError: weights are not available.
        """
        sampler = config.sampler.over(world.description)
        predictor = Predictor(world, moments, config.stride, sampler, config.chunk)
        return cls(predictor, cost or load_cost(config.cost, world, config.learned), config.repeats)

    def to_goals(
        self,
        context: Tensor,
        goals: Tensor,
        generator: torch.Generator,
        mask: Tensor | None = None,
        spacing: Tensor | float | None = None,
        text: Tensor | None = None,
    ) -> "Towards":
        """The score of reaching goals.

        Args:
            context: (B, T, 3, H, W) past frames in [-1, 1].
            goals: (B, 3, H, W).
            generator: draws the noise.
            mask: (B, T), True where a past frame exists.
            spacing: see `WorldModel.begin`.
            text: see `WorldModel.begin`.
        """
        state = self.predictor.begin(context, mask, spacing, text)
        noises = [self.predictor.draw_noise(generator) for _ in range(self.repeats)]
        return Towards(self, state, goals.to(context.device), noises)


@dataclass
class Towards:
    """The score of reaching goals from one past."""

    score: WorldScore
    state: WorldState
    goals: Tensor
    """(B, 3, H, W)."""
    noises: list[Tensor]
    """One for each repeat, see `Predictor.predict`."""

    def latents(self, actions: Tensor, repeat: int = 0) -> Tensor:
        """The latents predicted along candidates (B, S, H, K): (B, S, L, C, h, w)."""
        return self.score.predictor.predict(self.state, actions, self.noises[repeat])

    def frames(self, actions: Tensor) -> Tensor:
        """The same as frames (B, S, L, 3, H, W)."""
        return self.score.predictor.world.decode(self.latents(actions))

    @torch.no_grad()
    def __call__(self, actions: Tensor) -> Tensor:
        """See `Score`."""
        codec, cost = self.score.predictor.world.codec, self.score.cost
        repeats = (self.latents(actions, repeat) for repeat in range(len(self.noises)))  # one at a time in memory
        return torch.stack([cost.of_predicted(Predicted(codec, x), self.goals) for x in repeats]).mean(0)


@dataclass
class Guided:
    """A score with a Gaussian prior centred on a policy's steps, as in maximum a posteriori estimation.

    Errors of a policy and of a cost are independent, and an optimiser exploits those of the cost. A candidate's cost
    grows by `weight` times its mean squared deviation from the policy, in standard deviations.
    """

    score: Score
    mean: Tensor
    """(B, H, 3) of the policy's steps."""
    std: Tensor
    """(B, H, 3)."""
    weight: float
    moments: list[int]
    """The steps after which candidates are scored."""

    @classmethod
    def by(cls, network: GoalNetwork, frames: Tensor, goals: Tensor, score: Score, planner: Planner) -> "Guided":
        """A score guided by a network's proposals from frames to goals, (B, 3, H, W) each."""
        return cls(score, *network.propose(frames, goals), planner.config.guidance, planner.moments)

    def __call__(self, actions: Tensor) -> Tensor:
        """See `Score`."""
        deviations = ((actions - self.mean[:, None]) / self.std[:, None]).square().mean(3).cumsum(2)
        moments = torch.tensor(self.moments, device=actions.device)
        return self.score(actions) + self.weight * deviations[:, :, moments - 1] / moments


class CostWorld:
    """A world and a cost as `get_cost`, for solvers of other packages, such as those of stable-worldmodel.

    Args:
        score: predicts and compares.
        planner: if given, candidates are values of its family (of each knot of a spline), standardised by its prior,
            as solvers draw them; otherwise steps in metres and radians.
        spacing: metres between frames, see `WorldModel.begin`.
        seed: of the noise.
    """

    def __init__(self, score: WorldScore, planner: Planner | None = None, spacing: float | None = None, seed: int = 0):
        self.score, self.planner, self.spacing, self.seed = score, planner, spacing, seed
        self._last: tuple[Tensor, Tensor, Score] | None = None

    def actions(self, candidates: Tensor) -> Tensor:
        """The steps (…, H, 3) of candidates, in metres and radians."""
        if self.planner is None:
            return candidates
        prior = self.planner.prior
        return self.planner.project(self.planner.family.actions(prior.mean + prior.std * candidates))

    def get_cost(self, info: dict[str, Tensor], candidates: Tensor) -> Tensor:
        """Costs (B, S) of candidates (B, S, H, 3), or (B, S, knots, 3).

        Args:
            info: "pixels", the past frames (B, T, 3, H, W), and "goal", (B, 3, H, W), in [-1, 1]. A dimension S after
                B, along which solvers repeat them, is allowed. A past is encoded once for consecutive calls.
        """
        context, goals = info["pixels"], info["goal"]
        if context.ndim == 6:
            context, goals = context[:, 0], goals[:, 0]
        last = self._last
        if last is None or not (torch.equal(last[0], context) and torch.equal(last[1], goals)):
            generator = torch.Generator(context.device).manual_seed(self.seed)
            last = self._last = context, goals, self.score.to_goals(context, goals, generator, spacing=self.spacing)
        return last[2](self.actions(candidates)).min(2).values


def _total(costs: Tensor, actions: Tensor, penalty: Penalty | None) -> Tensor:
    """Costs (B, S) of candidates at their closest moment, with the penalty."""
    closest = costs.min(2).values
    return closest if penalty is None else closest + penalty(integrate(actions))
