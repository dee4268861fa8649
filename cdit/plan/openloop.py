"""The open-loop benchmark: plans to the frame some seconds ahead, compared with the recorded actions.

Every method answers the same cases. Suffixes: B cases of a batch, H steps, K numbers of an action (3 for motion).
"""

import time
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cdit.batch import Batch
from cdit.common.errors import UserError
from cdit.common.frames import to_float
from cdit.common.motion import integrate
from cdit.common.randomness import generator
from cdit.common.statistics import Estimate, estimates, paired_difference
from cdit.data.action_space import ActionSpace
from cdit.evaluate.cases import Case, read_index, spread_cases
from cdit.loading import load_world, windows_for
from cdit.plan.actions import composed, recorded_steps
from cdit.plan.candidates import recorded_actions
from cdit.plan.config import CurveConfig, DiagnoseConfig, OpenConfig, OpenLoopConfig
from cdit.plan.errors import action_errors, measures_of, path_errors
from cdit.plan.goal_network import load_goal_network
from cdit.plan.planner import Guided, Plan, Planner, Towards, WorldScore
from cdit.world_model import WorldModel

METHODS = {
    "world": "planned with the world",
    "policy": "inverse dynamics",
    "ranked": "inverse dynamics, ranked by the world",
    "guided": "planned with the world, guided by inverse dynamics",
    "prior": "mean of the candidates",
    "straight": "straight ahead",
    "random": "a random candidate",
    "stay": "standing still",
    "truth": "true actions as a candidate",
}
"""Methods and their names in tables. The error of the last is what the family of candidates cannot express."""
PLANNERS = "world", "guided"
"""Methods that the table compares with all others but the last."""


@dataclass
class Answers:
    """The plans of one method for N cases."""

    paths: Tensor
    """(N, H, K), the actions from the start to the end of each step."""
    seconds: float = 0.0
    """Average per plan."""
    costs: Tensor | None = None
    """(N,) costs of the plans, if the world scored them."""


@dataclass
class Picture:
    """The picture of a case. Frames are (3, H, W) in [-1, 1], paths those of `Answers`."""

    case: Case
    start: Tensor
    goal: Tensor
    best: Tensor
    """Predicted at the end of the plan."""
    worst: Tensor
    """Predicted for the candidate of highest cost."""
    pose: Tensor | None
    """(3,) of the start in the world: x, y, yaw; None if actions are not motion."""
    paths: Tensor
    """(S, H, K), of all candidates."""
    costs: Tensor
    """(S,)."""
    plan: Tensor
    """(H, K)."""


@dataclass
class OpenResults:
    """The benchmark's numbers."""

    about: dict[str, Any]
    cases: list[Case]
    truth: Tensor
    """(N, H, K)."""
    answers: dict[str, Answers]
    spacing: float
    space: ActionSpace
    pictures: list[Picture] = field(default_factory=list)

    @property
    def measures(self) -> dict[str, int]:
        """The errors and their decimals."""
        return measures_of(self.space)

    def errors(self, method: str) -> np.ndarray:
        """(N, M), the measures."""
        paths = self.answers[method].paths
        if self.space.kind == "motion":
            return torch.stack(path_errors(paths, self.truth, self.spacing), dim=-1).numpy()
        return action_errors(paths, self.truth, self.space).numpy()

    def estimates(self, method: str) -> list[Estimate]:
        """Means of the errors, with intervals over trajectories."""
        return estimates(self.errors(method), [case.name for case in self.cases])

    def differences(self, planner: str, method: str) -> list[Estimate]:
        """A planner's errors minus a method's, case by case."""
        return paired_difference(self.errors(planner), self.errors(method), [case.name for case in self.cases])


class Benchmark:
    """A world, the cases, and everything that planning needs.

    Raises:
        UserError: checkpoint, data or options are incompatible.
    """

    def __init__(self, config: OpenLoopConfig):
        config.validate()
        self.config = config
        opens = isinstance(config, OpenConfig)
        self.world = load_world(config.checkpoint, config.device, moving=not opens, text=config.text)
        self.space = self.world.description.actions
        if self.space.kind != "motion":
            config.planner.validate_without_motion()
        self.dataset = windows_for(self.world, config)
        if not self.dataset.info.has_actions:
            raise UserError(f"{config.data}: has no actions to compare plans with")
        fps = self.world.description.fps
        self.horizon = round(config.seconds * fps)
        if self.horizon < 1:
            raise UserError(f"seconds is {config.seconds:g}, expected at least one frame, {1 / fps:g} s")
        own_costs = isinstance(config, DiagnoseConfig)
        (replace(config.planner, cost="pixels") if own_costs else config.planner).validate(self.horizon)
        if config.index:
            self.cases = read_index(config.index, self.dataset, self.horizon, self.world.description.min_history)
        else:
            self.cases = spread_cases(self.dataset, self.horizon, config.episodes, "seconds")
        self.recorded = prior_actions(self.world, config, self.horizon)
        self.spacing = self.dataset.info.spacing or 1.0
        learned = config.planner.learned if opens else None  # for proposals
        self.network = load_goal_network(learned, self.world.device) if learned else None
        if self.network is not None and self.network.description.horizon != self.horizon:
            proposed = self.network.description.horizon
            raise UserError(f"planner.learned proposes {proposed} steps, expected {self.horizon}, the length of a plan")
        steps = [
            recorded_steps(self.dataset.trajectories[case.trajectory], self.space, case.now, case.now + self.horizon)
            for case in self.cases
        ]
        self.truth_actions = torch.stack(steps)
        self.truth = composed(self.truth_actions, self.space)

    def batch(self, number: int) -> Batch:
        """A case with its frames, on the world's device."""
        window = self.dataset.window(self.cases[number].window, [self.horizon])
        return Batch.collate([window]).to(self.world.device)

    def planned(self, planner: Planner, score: WorldScore, bar: tqdm | None = None) -> tuple[Answers, list[Plan]]:
        """Plans for every case, each with its own seed for noise and candidates."""
        plans, costs, started = [], [], time.perf_counter()
        for number in range(len(self.cases)):
            scored = score_of(score, self.batch(number), self.config.seed, number)
            plan = planner.plan(scored, 1, generator(self.config.seed, 1, number))
            plans.append(plan)
            costs.append(scored(plan.actions[:, None])[:, 0].min(1).values)
            if bar is not None:
                bar.update()
        seconds = (time.perf_counter() - started) / len(plans)
        paths = composed(torch.cat([plan.actions for plan in plans]), self.space).cpu()
        return Answers(paths, seconds, torch.cat(costs).cpu()), plans

    def baselines(self, planner: Planner, score: WorldScore) -> dict[str, Answers]:
        """The answers of the other methods."""
        count, prior, family = len(self.cases), planner.prior, planner.family
        draw = torch.randint(len(prior.recorded), (count,), generator=generator(self.config.seed, 2))
        fitted = planner.project(family.actions(family.values(self.truth_actions)))
        actions = {
            "prior": planner.project(family.actions(prior.mean)).cpu().expand(count, -1, -1),
            "stay": self._staying(),
            "random": planner.project(family.actions(prior.recorded[draw.to(prior.mean.device)])).cpu(),
            "truth": fitted,
        }
        if self.space.kind == "motion":
            straight = torch.zeros(self.horizon, 3)
            straight[:, 0] = self.recorded[..., 0].mean()
            actions["straight"] = straight.expand(count, -1, -1)
        found = {name: Answers(composed(steps, self.space)) for name, steps in actions.items()}
        found["truth"].costs = self._costs(score, fitted)
        if self.network is not None:
            found |= self._proposals(planner, score)
        return found

    def _staying(self) -> Tensor:
        """Steps (N, H, K) that change nothing: what led to the present frame, if numbers are absolute, otherwise 0."""
        trajectories = [self.dataset.trajectories[case.trajectory] for case in self.cases]
        held = [self.space.between(x, [case.now], [case.now]) for x, case in zip(trajectories, self.cases, strict=True)]
        return torch.from_numpy(np.stack(held)).float().expand(-1, self.horizon, -1)

    def _costs(self, score: WorldScore, actions: Tensor) -> Tensor:
        """The world's costs (N,) of one candidate per case (N, H, K)."""
        costs = []
        for number in range(len(self.cases)):
            scored = score_of(score, self.batch(number), self.config.seed, number)
            costs.append(scored(actions[number, None, None].to(self.world.device))[:, 0].min(1).values)
        return torch.cat(costs).cpu()

    def _proposals(self, planner: Planner, score: WorldScore) -> dict[str, Answers]:
        """The policy's mean, the best of its proposals by the world's costs, and the plan guided by them."""
        found: dict[str, list[Tensor]] = {"policy": [], "ranked": [], "guided": []}
        for number in range(len(self.cases)):
            batch = self.batch(number)
            frame, goal = to_float(batch.context[:, -1]), to_float(batch.target[:, 0])
            scored = score_of(score, batch, self.config.seed, number)
            draws, samples = generator(self.config.seed, 3, number), self.config.planner.optimizer.samples
            proposed = self.network.proposals(frame, goal, samples, draws)
            found["policy"].append(proposed[:, 0])
            found["ranked"].append(planner.rank(scored, proposed).actions)
            guided = Guided.by(self.network, frame, goal, scored, planner)
            found["guided"].append(planner.plan(guided, 1, draws, proposed=proposed[:, : samples // 2]).actions)
        return {name: Answers(integrate(torch.cat(actions)).cpu()) for name, actions in found.items()}


def run_open(config: OpenConfig) -> OpenResults:
    """Plans every case with every method.

    Raises:
        UserError: checkpoint, data or options are incompatible.
    """
    benchmark = Benchmark(config)
    planner = Planner.fit(config.planner, benchmark.recorded, benchmark.world.device)
    score = WorldScore.of(benchmark.world, config.planner, planner.moments)
    with tqdm(total=len(benchmark.cases), desc="planning", unit="episode") as bar:
        answers, plans = benchmark.planned(planner, score, bar)
    found = {"world": answers} | benchmark.baselines(planner, score)
    results = OpenResults(asdict(config), benchmark.cases, benchmark.truth, found, benchmark.spacing, benchmark.space)
    motion = benchmark.space.kind == "motion"
    results.about["planner"]["motions"] = config.planner.motions if motion else config.planner.candidates
    shown = np.linspace(0, len(plans) - 1, min(config.pictures, len(plans))).round().astype(int)
    results.pictures = [picture_of(benchmark, score, plans[i], int(i)) for i in shown]
    return results


@dataclass
class CurvePoint:
    """The error of plans of one budget."""

    samples: int
    iterations: int
    repeats: int
    steps: int
    """Denoising steps."""
    calls: int
    """Frames times denoising steps that the network computes for a plan."""
    seconds: float
    """Per plan."""
    errors: list[Estimate]
    """ATE, RPE, metres, degrees."""


def run_curve(config: CurveConfig) -> list[CurvePoint]:
    """The error by numbers of candidates, iterations, repeats and denoising steps, on the same cases.

    Raises:
        UserError: checkpoint, data or options are incompatible.
    """
    benchmark, points = Benchmark(config), []
    plans = config.planner
    grid = list(product(config.samples, config.iterations, config.repeats, config.steps))
    cost = None
    with tqdm(total=len(grid) * len(benchmark.cases), desc="planning", unit="episode") as bar:
        for samples, iterations, repeats, steps in grid:
            elites = max(2, round(samples * plans.optimizer.elites / plans.optimizer.samples))
            optimizer = replace(plans.optimizer, samples=samples, iterations=iterations, elites=elites)
            chosen = replace(plans, optimizer=optimizer, repeats=repeats, sampler=replace(plans.sampler, steps=steps))
            planner = Planner.fit(chosen, benchmark.recorded, benchmark.world.device)
            score = WorldScore.of(benchmark.world, chosen, planner.moments, cost)
            cost = score.cost
            answers, _ = benchmark.planned(planner, score, bar)
            found = {"world": answers}
            results = OpenResults({}, benchmark.cases, benchmark.truth, found, benchmark.spacing, benchmark.space)
            calls = samples * iterations * repeats * steps * score.predictor.calls
            points.append(
                CurvePoint(samples, iterations, repeats, steps, calls, answers.seconds, results.estimates("world"))
            )
    return points


def nwm_compatible(config: OpenConfig) -> OpenConfig:
    """The protocol of the NWM release: 120 candidates on straight lines, 5 elites, one iteration, 3 repeats, every
    frame, 250 denoising steps, LPIPS of the last frame, and the mean of the elites as the plan.
    """
    optimizer = replace(
        config.planner.optimizer, name="cem", samples=120, elites=5, iterations=1, first="gaussian", result="mean"
    )
    sampler = replace(config.planner.sampler, steps=config.planner.sampler.steps or 250)
    planner = replace(
        config.planner, candidates="constant", optimizer=optimizer, cost="lpips", stride=1, repeats=3, sampler=sampler
    )
    return replace(config, planner=planner)


def prior_actions(world: WorldModel, config: OpenLoopConfig, horizon: int) -> Tensor:
    """Steps (N, H, K) of the split that candidates resemble.

    Raises:
        UserError: there are none.
    """
    recorded = recorded_actions(
        windows_for(world, replace(config, split=config.prior_split), with_text=False).trajectories,
        horizon,
        world.description.actions,
    )
    if not len(recorded):
        raise UserError(f"prior_split: no trajectory of {config.prior_split!r} has actions of {horizon + 1} frames")
    return recorded


def score_of(score: WorldScore, batch: Batch, seed: int, number: int) -> Towards:
    """The score of a batch's cases, with noise seeded by the case's number."""
    noise = generator(seed, 0, number, device=batch.target.device)
    goals = to_float(batch.target[:, -1])
    given = batch.condition
    return score.to_goals(to_float(batch.context), goals, noise, batch.mask, given.spacing, given.text)


def picture_of(benchmark: Benchmark, score: WorldScore, plan: Plan, number: int) -> Picture:
    """The picture of a case."""
    batch = benchmark.batch(number)
    tried, costs = torch.cat(plan.tried, dim=1), torch.cat(plan.costs, dim=1)[0]
    chosen = torch.stack((plan.actions[0], tried[0, costs.argmax()]))[None]
    frames = score_of(score, batch, benchmark.config.seed, number).frames(chosen)[0, :, -1]
    case = benchmark.cases[number]
    trajectory = benchmark.dataset.trajectories[case.trajectory]
    return Picture(
        case,
        start=to_float(batch.context[0, -1]).cpu(),
        goal=to_float(batch.target[0, -1]).cpu(),
        best=frames[0].cpu(),
        worst=frames[1].cpu(),
        pose=torch.tensor([*trajectory.position[case.now], trajectory.yaw[case.now]]).float()
        if benchmark.space.kind == "motion"
        else None,
        paths=composed(tried[0], benchmark.space).cpu(),
        costs=costs.cpu(),
        plan=composed(plan.actions[0], benchmark.space).cpu(),
    )
