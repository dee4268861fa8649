"""The closed loop: agents act in an environment, episode by episode, and are evaluated."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cdit.common.errors import UserError
from cdit.common.files import read_json, sha256, write_json, write_whole
from cdit.loading import load_world, windows_for
from cdit.plan.agents import (
    Agent,
    Candidates,
    EngineScores,
    Expert,
    MotionScores,
    Move,
    Planned,
    Policy,
    Remembering,
    Scores,
    Task,
    WorldScores,
)
from cdit.plan.candidates import recorded_actions
from cdit.plan.config import ActConfig
from cdit.plan.environment import DoomEnvironment, Environment, Seen
from cdit.plan.episodes import Episode, load_episodes
from cdit.plan.film import film
from cdit.plan.free_space import FreeSpace
from cdit.plan.goal_network import load_goal_network
from cdit.plan.graph import Graph
from cdit.plan.planner import Planner, WorldScore

OUTCOMES = "outcomes.jsonl"


@dataclass
class Outcome:
    """The result of an episode."""

    agent: str
    episode: int
    """Its number in the file."""
    stratum: float
    visible: bool
    stopped: bool
    """Whether the agent ended it."""
    success: bool
    """Whether it stopped at the goal."""
    passed: bool
    """Whether it was at the goal at any time."""
    distance: float
    """Remaining distance at the end, in metres along free space."""
    degrees: float
    """Heading error at the end."""
    spl: float
    """Success weighted by path length (Anderson et al. 2018, arXiv 1807.06757)."""
    soft_spl: float
    """Progress weighted by path length, as in Habitat: max(0, 1 - distance / initial) · shortest / walked."""
    walked: float
    """Metres."""
    steps: int
    contacts: int
    """Steps that end in contact with a wall."""
    violations: int
    """Poses in the forbidden rectangle, including the start."""
    seconds: float
    """Average per plan; 0 without plans."""


@dataclass
class Trace:
    """The record of an episode."""

    past: list[Seen]
    """All frames, including those of the walk-in."""
    moves: list[tuple[int, Move]] = field(default_factory=list)
    """Plans, and the index of the frame at which each was made."""
    seconds: list[float] = field(default_factory=list)
    """Per move, including the decision to stop."""


def run_episode(environment: Environment, agent: Agent, task: Task, radius: float, angle: float) -> Trace:
    """Acts until the agent stops or its budget is exhausted.

    Args:
        environment: executes the moves.
        agent: chooses them.
        task: the episode, with its goal image.
        radius: metres within which a goal is reached.
        angle: radians within which a goal is reached.
    """
    trace = Trace(environment.reset(task.episode))
    agent.begin(task)
    left, stopped = task.episode.budget, False
    while left > 0 and not stopped:
        started = time.perf_counter()
        move = agent.act(trace.past, radius, angle)
        trace.seconds.append(time.perf_counter() - started)
        trace.moves.append((len(trace.past) - 1, move))
        stopped = not len(move.actions)
        for action in move.actions[:left]:
            trace.past.append(environment.step(action))
            left -= 1
            if agent.stops(trace.past[-1], radius, angle):
                break
    return trace


def judged(trace: Trace, task: Task, agent: str, number: int, config: ActConfig) -> Outcome:
    """The outcome of an episode."""
    episode, begin = task.episode, next(iter(i for i, _ in trace.moves))
    poses = np.array([seen.pose for seen in trace.past[begin:]])
    distance = np.array([task.distances.left(place) for place in poses[:, :2]])
    turn = np.degrees(np.abs((poses[:, 2] - episode.goal[2] + np.pi) % (2 * np.pi) - np.pi))
    reached = (distance <= config.radius) & (turn <= config.degrees)
    left = float(distance[-1])
    walked = float(np.linalg.norm(np.diff(poses[:, :2], axis=0), axis=1).sum())
    stopped = not len(trace.moves[-1][1].actions)
    efficiency = episode.distance / max(episode.distance, walked)
    x1, y1, x2, y2 = config.avoid or (math.inf,) * 4
    inside = (poses[:, 0] > x1) & (poses[:, 0] < x2) & (poses[:, 1] > y1) & (poses[:, 1] < y2)
    plans = trace.seconds[:-1] if stopped else trace.seconds
    return Outcome(
        agent,
        number,
        episode.stratum,
        episode.visible,
        stopped,
        success=bool(stopped and reached[-1]),
        passed=bool(reached.any()),
        distance=min(left, 1e3),
        degrees=float(turn[-1]),
        spl=float(stopped and reached[-1]) * efficiency,
        soft_spl=max(0.0, 1 - left / episode.distance) * efficiency,
        walked=walked,
        steps=len(poses) - 1,
        contacts=sum(seen.contact for seen in trace.past[begin + 1 :]),
        violations=int(inside.sum()),
        seconds=float(np.mean(plans)) if plans else 0.0,
    )


def act(config: ActConfig) -> tuple[list[Episode], list[Outcome]]:
    """Runs the episodes that OUT/outcomes.jsonl lacks, and records videos of some.

    Raises:
        UserError: checkpoint, data or options are incompatible.
    """
    episodes, out = load_episodes(config.episodes), Path(config.out)
    chosen = select(episodes, config.most)
    (out / "videos").mkdir(parents=True, exist_ok=True)
    check_same(config, out)
    done = {(outcome.agent, outcome.episode): outcome for outcome in read_outcomes(out)}
    write_whole(out / OUTCOMES, "".join(json.dumps(asdict(outcome)) + "\n" for outcome in done.values()))
    missing = [(name, i) for name in config.agents for i in chosen if (name, i) not in done]
    with tqdm(total=len(missing), unit="episode") as bar:
        for map_name in dict.fromkeys(episodes[i].map for _, i in missing):
            todo = [(name, i) for name, i in missing if episodes[i].map == map_name]
            with Setting(config, map_name) as setting:
                for name, of_agent in groupby(todo, itemgetter(0)):
                    bar.set_description(name)
                    agent = setting.agent(name)
                    for _, i in of_agent:
                        task = setting.task(episodes[i], i)
                        angle = math.radians(config.degrees)
                        trace = run_episode(setting.environment, agent, task, config.radius, angle)
                        done[name, i] = outcome = judged(trace, task, name, i, config)
                        first = [j for j in chosen if stratum(episodes[j]) == stratum(episodes[i])][: config.videos]
                        if i in first:
                            film(trace, task, outcome, setting.space, out / "videos" / f"{name}_{i}.mp4")
                        with open(out / OUTCOMES, "a") as file:
                            file.write(json.dumps(asdict(outcome)) + "\n")
                        bar.update()
    return episodes, [done[name, i] for name in config.agents for i in chosen]


def check_same(config: ActConfig, out: Path) -> None:
    """Checks that the outcomes in a folder were made with the same options.

    Raises:
        UserError: they were not.
    """
    path, kept = out / "made_of.json", asdict(config)
    for name in ("out", "agents", "most", "videos"):
        del kept[name]
    kept["episodes"] = sha256(Path(config.episodes))
    if any(read_outcomes(out)) and path.is_file() and read_json(path) != kept:
        raise UserError(f"out: {out} has outcomes of a run with other options: choose another folder")
    write_json(path, kept)


def stratum(episode: Episode) -> tuple[str, float, bool]:
    """The group of an episode in tables."""
    return episode.map, episode.stratum, episode.visible


def select(episodes: list[Episode], most: int | None) -> list[int]:
    """Numbers of the first episodes of each stratum."""
    count: dict[Any, int] = {}
    chosen = []
    for i, episode in enumerate(episodes):
        count[stratum(episode)] = count.get(stratum(episode), 0) + 1
        if most is None or count[stratum(episode)] <= most:
            chosen.append(i)
    return chosen


def read_outcomes(out: Path) -> Iterator[Outcome]:
    """The outcomes written so far, without a truncated last line."""
    path = out / OUTCOMES
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            yield Outcome(**json.loads(line))
        except (ValueError, TypeError):
            continue


class Setting:
    """One map, with everything that agents need on it. A context manager.

    Args:
        config: of the closed loop.
        map_name: of the map.
    """

    def __init__(self, config: ActConfig, map_name: str):
        self.config = config
        self.world = load_world(config.checkpoint, config.device, moving=True, text=config.text)
        size = self.world.description.image_size
        if size[0] != size[1]:
            raise UserError(
                f"checkpoint: predicts frames of {size[0]}×{size[1]}, expected square ones, as the engine renders"
            )
        self.dataset = windows_for(self.world, config, with_text=False)
        self.recorded = recorded_actions(self.dataset.trajectories, config.horizon)
        if not len(self.recorded):
            raise UserError(f"{config.data}: no walk of {config.horizon + 1} frames with poses to draw candidates from")
        learned = config.planner.learned
        self.network = load_goal_network(learned, self.world.device) if learned else None
        if self.network and self.network.description.horizon != config.horizon:
            proposed = self.network.description.horizon
            raise UserError(f"planner.learned proposes {proposed} steps, expected {config.horizon} (horizon)")
        self.planner = Planner.fit(config.planner, self.recorded, self.world.device)
        self.score = WorldScore.of(self.world, config.planner, self.planner.moments)
        self.environment, self.other = (DoomEnvironment(map_name, size[0]) for _ in range(2))
        self.space = FreeSpace(self.environment.geometry)

    def __enter__(self) -> "Setting":
        return self

    def __exit__(self, *exception: object) -> None:
        self.environment.engine.close()
        self.other.engine.close()

    def task(self, episode: Episode, number: int) -> Task:
        """An episode, with its goal image."""
        goal = self.other.goal(episode)
        return Task(goal, self.config.seed + number, episode, self.space.distances(np.array(episode.goal[:2])))

    def agent(self, name: str) -> Agent:
        """The agent of that name, see `ActConfig.agents`."""
        config, planner, cost = self.config, self.planner, self.score.cost
        learned = self.network, config.arrived, config.execute
        moments, by_world = planner.moments, WorldScores(self.score, self.dataset.info.spacing)
        by_engine = EngineScores(self.other, moments, cost, self.world.device)

        arrived = None if self.network is None else config.arrived

        def planned(scores: Scores, kind: type[Planned] = Planned, **options: object) -> Planned:
            shared = {"avoid": config.avoid, "network": self.network, "arrived": arrived}
            return kind(planner, scores, config.execute, **shared, **options)

        makers = {
            "random": lambda: Candidates(*learned, recorded=self.recorded, straight=False),
            "straight": lambda: Candidates(*learned, recorded=self.recorded, straight=True),
            "policy": lambda: Policy(*learned),
            "ranked": lambda: planned(by_world, proposals="rank"),
            "guided": lambda: planned(by_world, proposals="guide"),
            "world": lambda: planned(by_world),
            "engine": lambda: planned(by_engine),
            "world_distance": lambda: planned(MotionScores(moments), by_pose=True),
            "engine_distance": lambda: planned(EngineScores(self.other, moments), by_pose=True),
            "graph": lambda: planned(
                by_world, Remembering, graph=Graph.build(self.dataset, self.network, config.graph_frames)
            ),
            "expert": lambda: Expert(config.execute),
        }
        return makers[name]()
