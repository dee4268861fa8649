"""Agents of the closed loop. They separate causes of failure: dynamics, cost, optimiser, stopping."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cdit.common.motion import integrate, placed
from cdit.common.randomness import generator
from cdit.plan.constraints import Penalty, staying_out
from cdit.plan.environment import DoomEnvironment, Seen
from cdit.plan.episodes import Episode
from cdit.plan.free_space import Distances
from cdit.plan.goal_network import GoalNetwork
from cdit.plan.graph import Graph
from cdit.plan.planner import Guided, Planner, Score, Towards, WorldScore

MASTERED = 0.6
"""Fraction of the success radius and angle within which agents that know the true distance stop."""


@dataclass
class Task:
    """An episode as agents see it, and privileged information for some."""

    goal: Tensor
    """(3, H, W), the goal image."""
    seed: int
    """Seed of the agent's draws."""
    episode: Episode
    """Privileged."""
    distances: Distances
    """Privileged: to the goal, on the map."""


@dataclass
class Move:
    """What to do next."""

    actions: Tensor
    """(n, 3), executed before the agent is asked again; none to stop."""
    path: Tensor | None = None
    """(H, 3), the whole plan in the frame at its start; shown in the video."""
    dream: Tensor | None = None
    """(3, H, W), the frame predicted at its end."""


STOP = Move(torch.zeros(0, 3))
Scores = Callable[[list[Seen], Task, Tensor, torch.Generator], Score]
"""Makes the score of a move from all past frames, the task, a goal image and a random generator."""


class Agent(ABC):
    """Acts until it believes it is at the goal."""

    def begin(self, task: Task) -> None:
        """Starts an episode."""
        self.task, self.asked = task, 0

    def act(self, past: list[Seen], radius: float, angle: float) -> Move:
        """The next move, given all past frames, oldest first; radius in metres and angle in radians define success."""
        if self.stops(past[-1], MASTERED * radius, MASTERED * angle):
            return STOP
        self.asked += 1
        return self.move(past)

    @abstractmethod
    def stops(self, seen: Seen, radius: float, angle: float) -> bool:
        """Whether to stop before a plan is made."""

    @abstractmethod
    def move(self, past: list[Seen]) -> Move:
        """The next steps, or `STOP`."""

    def random(self) -> torch.Generator:
        """Random generator for the current move, on the CPU."""
        return generator(self.task.seed, self.asked)

    def is_there(self, seen: Seen, radius: float, angle: float) -> bool:
        """Privileged: whether the true pose is at the goal."""
        turn = math.remainder(seen.pose[2] - self.task.episode.goal[2], 2 * math.pi)
        return bool(self.task.distances.at(seen.pose[:2]) < radius and abs(turn) < angle)


def arrival(network: GoalNetwork, seen: Seen, goal: Tensor) -> float:
    """The predicted probability of being at a goal (3, H, W)."""
    return network.arrival(*compared(network, seen, goal)).item()


def compared(network: GoalNetwork, seen: Seen, goal: Tensor) -> tuple[Tensor, Tensor]:
    """The current frame and a goal, (1, 3, H, W) each on the network's device."""
    device = network.head.weight.device
    return seen.frame[None].to(device), goal[None].to(device)


class Learned(Agent):
    """Stops by the learned probability of having arrived.

    Args:
        network: compares frames with the goal.
        arrived: probability above which to stop.
        execute: steps of a plan that are executed.
    """

    def __init__(self, network: GoalNetwork, arrived: float, execute: int):
        self.network, self.arrived, self.execute = network, arrived, execute

    def stops(self, seen: Seen, radius: float, angle: float) -> bool:
        """See `Agent`."""
        return arrival(self.network, seen, self.task.goal) > self.arrived


class Candidates(Learned):
    """Executes a recorded motion, drawn at random each time, or walks straight ahead."""

    def __init__(self, *shared: object, recorded: Tensor, straight: bool):
        super().__init__(*shared)
        self.recorded, self.straight = recorded, straight

    def move(self, past: list[Seen]) -> Move:
        """See `Agent`."""
        actions = self.recorded[torch.randint(len(self.recorded), (), generator=self.random())].clone()
        if self.straight:
            actions = torch.zeros_like(actions)
            actions[:, 0] = self.recorded[..., 0].mean()
        return Move(actions[: self.execute], integrate(actions))


class Policy(Learned):
    """Inverse dynamics: the mean of the actions that lead from the current frame to the goal."""

    def move(self, past: list[Seen]) -> Move:
        """See `Agent`."""
        mean, _ = self.network.propose(*compared(self.network, past[-1], self.task.goal))
        actions = mean[0].cpu()
        return Move(actions[: self.execute], integrate(actions))


class Planned(Agent):
    """A planner and the scores of its candidates.

    Unless it stops by pose, it stops when no candidate, allowed or not, is predicted to lead closer to the goal than
    standing still.

    Args:
        planner: finds the best candidate.
        scores: makes the score of a move.
        execute: steps of a plan that are executed; fewer if the plan ends earlier.
        by_pose: whether to stop by the true pose instead (privileged).
        avoid: a rectangle of the map that no plan may cross.
        network: compares frames with the goal.
        proposals: how its proposals are used. rank: they are the only candidates; guide: they are half of the first
            candidates, and the prior of all (`Guided`).
        arrived: probability of having arrived, predicted by the network, above which it also stops.
    """

    def __init__(
        self,
        planner: Planner,
        scores: Scores,
        execute: int,
        by_pose: bool = False,
        avoid: list[float] | None = None,
        network: GoalNetwork | None = None,
        proposals: Literal["rank", "guide"] | None = None,
        arrived: float | None = None,
    ):
        self.planner, self.scores, self.execute, self.by_pose = planner, scores, execute, by_pose
        self.avoid, self.network, self.proposals, self.arrived = avoid, network, proposals, arrived

    def begin(self, task: Task) -> None:
        """See `Agent`."""
        super().begin(task)
        self.last: Tensor | None = None

    def stops(self, seen: Seen, radius: float, angle: float) -> bool:
        """See `Agent`."""
        if self.by_pose:
            return self.is_there(seen, radius, angle)
        return self.arrived is not None and arrival(self.network, seen, self.task.goal) > self.arrived

    def move(self, past: list[Seen]) -> Move:
        """See `Agent`."""
        return self.towards(past, self.task.goal) or STOP

    def towards(self, past: list[Seen], goal: Tensor, insist: bool = False) -> Move | None:
        """The next steps to a goal image; None if no candidate is better than standing still, unless `insist`."""
        random, penalty = self.random(), self._penalty(past[-1])
        score = self.scores(past, self.task, goal, random)
        judged, proposed = score, None
        if self.proposals is not None:
            here, there = compared(self.network, past[-1], goal)
            samples = self.planner.config.optimizer.samples
            count = samples if self.proposals == "rank" else samples // 2
            proposed = self.network.proposals(here, there, count, random)
            if self.proposals == "guide":
                judged = Guided.by(self.network, here, there, score, self.planner)
        if self.proposals == "rank":
            plan = self.planner.rank(judged, proposed, penalty)
        else:
            plan = self.planner.plan(judged, 1, random, self.last, penalty, proposed)
        if not (self.by_pose or insist):
            still = judged(torch.zeros_like(plan.actions[:, None]))
            if still.min() <= plan.lowest:
                return None
        actions, count = plan.actions, max(1, min(self.execute, int(plan.length)))
        left = actions[:, count:]
        self.last = torch.cat((left, left[:, -1:].expand(-1, count, -1)), dim=1) if left.shape[1] else None
        dream = None
        if isinstance(score, Towards):
            dream = score.frames(actions[:, None])[0, 0, self.planner.moments.index(int(plan.length))].cpu()
        return Move(actions[0, :count].cpu(), integrate(actions[0]).cpu(), dream)

    def _penalty(self, seen: Seen) -> Penalty | None:
        if not self.avoid:
            return None
        x1, y1, x2, y2 = self.avoid
        pose = torch.from_numpy(seen.pose).float()

        def forbidden(position: Tensor) -> Tensor:
            flat = torch.cat((position, torch.zeros_like(position[..., :1])), dim=-1)
            x, y, _ = placed(flat, pose.to(flat)).unbind(-1)
            return (x > x1) & (x < x2) & (y > y1) & (y < y2)

        return staying_out(forbidden)


class Expert(Agent):
    """Walks the shortest path on the map, and turns at the goal.

    Args:
        execute: steps that are executed before it observes again.
    """

    def __init__(self, execute: int):
        self.execute = execute

    def stops(self, seen: Seen, radius: float, angle: float) -> bool:
        """See `Agent`."""
        return self.is_there(seen, radius, angle)

    def move(self, past: list[Seen]) -> Move:
        """See `Agent`."""
        pose, goal = past[-1].pose.copy(), np.array(self.task.episode.goal)
        actions = []
        for _ in range(self.execute):
            offset = self._ahead(pose[:2]) - pose[:2]
            far = np.linalg.norm(goal[:2] - pose[:2])
            heading = goal[2] if far < 0.25 else math.atan2(offset[1], offset[0])
            turn = math.remainder(heading - pose[2], 2 * math.pi)
            dyaw = float(np.clip(turn, -0.5, 0.5))
            dx = 0.0 if abs(turn) > 0.6 else min(0.35, far) * (far > 0.1)
            actions.append([dx, 0.0, dyaw])
            pose += [dx * math.cos(pose[2]), dx * math.sin(pose[2]), dyaw]
        steps = torch.tensor(actions)
        return Move(steps, integrate(steps))

    def _ahead(self, position: np.ndarray) -> np.ndarray:
        """A position a little ahead on the path."""
        way = self.task.distances.path(position)
        return way[min(2, len(way) - 1)]


class Remembering(Planned):
    """Plans from one remembered frame to the next, along a graph, until the goal is close."""

    def __init__(self, *planned: object, graph: Graph, **options: object):
        super().__init__(*planned, **options)
        self.graph = graph

    def begin(self, task: Task) -> None:
        """See `Agent`."""
        super().begin(task)
        self.route = self.graph.to_goal(task.goal)

    def move(self, past: list[Seen]) -> Move:
        """See `Agent`."""
        target, image = self.route.next(past[-1].frame)
        if target is None:
            return self.towards(past, self.task.goal) or STOP
        move = self.towards(past, image)
        if move is None:  # no plan leads closer, or it is out of sight: continue to the next frame
            _, image = self.route.skip()
            move = self.towards(past, image, insist=True)
        return move


@dataclass
class WorldScores:
    """Scores by the frames that a world predicts from the last observed ones."""

    score: WorldScore
    spacing: float | None = None
    """Metres between frames, see `WorldModel.begin`."""

    def __call__(self, past: list[Seen], task: Task, goal: Tensor, random: torch.Generator) -> Score:
        """See `Scores`."""
        world = self.score.predictor.world
        longest = world.cdit.config.max_context
        context = torch.stack([seen.frame for seen in past[-longest:]])[None].to(world.device)
        return self.score.to_goals(context, goal[None].to(world.device), random, spacing=self.spacing)


@dataclass
class EngineScores:
    """Scores by simulation in the engine: the same cost on its frames, or the true distance."""

    environment: DoomEnvironment
    moments: list[int]
    cost: Callable[[Tensor, Tensor], Tensor] | None = None
    """None: the true distance."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __call__(self, past: list[Seen], task: Task, goal: Tensor, random: torch.Generator) -> Score:
        """See `Scores`."""

        def score(actions: Tensor) -> Tensor:
            frames, poses = self.environment.simulate(past[-1].pose, actions[0], self.moments)
            if self.cost is None:
                return torch.from_numpy(task.distances.cost(poses, task.episode.goal[2])).float()[None].to(actions)
            shown = frames.flatten(0, 1)[None].to(self.device)
            return self.cost(shown, goal[None].to(self.device)).unflatten(1, frames.shape[:2])

        return score


@dataclass
class MotionScores:
    """Scores by the true distance from the end of the commanded motion, without walls and inertia."""

    moments: list[int]

    def __call__(self, past: list[Seen], task: Task, goal: Tensor, random: torch.Generator) -> Score:
        """See `Scores`."""
        pose = torch.from_numpy(past[-1].pose).float()

        def score(actions: Tensor) -> Tensor:
            poses = placed(integrate(actions.cpu()), pose)[:, :, [t - 1 for t in self.moments]]
            return torch.from_numpy(task.distances.cost(poses.numpy(), task.episode.goal[2])).to(actions)

        return score
