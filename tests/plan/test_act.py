import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rooms import build, room

from cdit.common.errors import UserError
from cdit.common.frames import to_float, to_uint8
from cdit.common.motion import integrate, placed
from cdit.plan import episodes as episodes_module
from cdit.plan.__main__ import COMMANDS_OF
from cdit.plan.act import Trace, act, judged, run_episode, select
from cdit.plan.act_report import write_act
from cdit.plan.agents import (
    Candidates,
    EngineScores,
    Expert,
    MotionScores,
    Move,
    Planned,
    Policy,
    Remembering,
    Task,
    WorldScores,
)
from cdit.plan.config import ActConfig, EpisodesConfig, OptimizerConfig, PlannerConfig
from cdit.plan.environment import DoomEnvironment, Seen
from cdit.plan.episodes import Episode, draw_episodes, in_view, load_episodes, save_episodes
from cdit.plan.free_space import FreeSpace
from cdit.plan.goal_network import GoalDescription, GoalNetwork
from cdit.plan.graph import WELD, WORTH, Graph
from cdit.plan.planner import Planner
from cdit.world_model import WorldModel

WALL_WITH_GAP = [*room(0, 0, 10, 8), (5, 0, 5, 5.0, 0, -1), (5.2, 5.0, 5.2, 0, 0, -1), (5, 5.0, 5.2, 5.0, 0, -1)]
NETWORK = GoalNetwork(GoalDescription(8, (0.1, 0.1, 0.1), (1.0, 1.0, 1.0), 0.5, 0.5)).eval()
SHARED = (NETWORK, 0.5, 4)
RECORDED = torch.randn(300, 8, 3, generator=torch.manual_seed(0)).cumsum(1) * torch.tensor([0.03, 0.02, 0.08])
RECORDED[..., 0] += 0.2


@pytest.fixture(scope="module")
def space() -> FreeSpace:
    return FreeSpace(build(WALL_WITH_GAP, [(0, 4)]))


def test_distances_go_round_walls(space: FreeSpace):
    distances = space.distances(np.array([8.0, 2.0]))
    assert distances.at(np.array([8.0, 6.0])) == pytest.approx(4, rel=0.03)
    # The way round passes the corners of the wall at a clearance of 0.6 m.
    round_corner = math.dist((2, 2), (4.4, 5.6)) + math.dist((4.4, 5.6), (5.8, 5.6)) + math.dist((5.8, 5.6), (8, 2))
    assert distances.at(np.array([2.0, 2.0])) == pytest.approx(round_corner, rel=0.06)
    assert distances.at(np.array([8.1, 2.1])) == pytest.approx(math.hypot(0.1, 0.1))
    # Beside a wall nobody can stand, but an agent that slid along it may end there: 1.7 m away.
    assert distances.at(np.array([9.7, 2.0])) == math.inf
    assert distances.left(np.array([9.7, 2.0])) == pytest.approx(1.7, abs=0.26)
    assert distances.left(np.array([8.0, 6.0])) == distances.at(np.array([8.0, 6.0]))
    # Half a metre for each radian of heading error at the goal, none from 2 m away on.
    poses, near = np.array([[8.1, 2.1, 0.4], [8.0, 6.0, 0.4]]), math.hypot(0.1, 0.1)
    expected = [near + 0.5 * 0.4 * (1 - near / 2), distances.at(np.array([8.0, 6.0]))]
    np.testing.assert_allclose(distances.cost(poses, 0.0), expected)
    way = distances.path(np.array([2.0, 2.0]))
    np.testing.assert_allclose(way[-1], [8, 2])
    assert all(space.free[space.cell(place)] for place in way)


def test_goals_are_in_view_or_not():
    geometry = build(WALL_WITH_GAP, [(0, 4)])
    start = np.array([2.0, 2.0, 0.0])
    assert in_view(geometry, start, np.array([4.0, 2.0]), math.radians(90))
    assert not in_view(geometry, start, np.array([8.0, 2.0]), math.radians(90))  # the wall
    assert not in_view(geometry, start, np.array([2.0, 6.0]), math.radians(90))  # to the side


class Plane:
    """An environment where every motion is carried out as it is."""

    def reset(self, episode: Episode) -> list[Seen]:
        self.pose = torch.tensor(episode.start)
        return [self._seen(torch.zeros(3))]

    def goal(self, episode: Episode) -> torch.Tensor:
        return torch.zeros(3, 64, 64)

    def step(self, action: torch.Tensor) -> Seen:
        self.pose = placed(action[None].double(), self.pose.double())[0]
        return self._seen(action)

    def _seen(self, motion: torch.Tensor) -> Seen:
        return Seen(torch.zeros(3, 64, 64), motion, self.pose.double().numpy(), contact=False)


def task_in(space: FreeSpace, start=(2.0, 6.5, 0.0), goal=(8.0, 6.5, 0.5)) -> Task:
    distance = float(space.distances(np.array(goal[:2])).at(np.array(start[:2])))
    episode = Episode("room", 1, start, start, goal, distance, 6.0, True)
    return Task(torch.zeros(3, 64, 64), 0, episode, space.distances(np.array(goal[:2])))


def config_of(**options) -> ActConfig:
    return ActConfig(**{"checkpoint": "", "data": "", "out": "", "episodes": "", **options})


def by_distance(**options) -> Planned:
    optimizer = OptimizerConfig(samples=60, iterations=3, elites=6)
    planner = Planner.fit(PlannerConfig(optimizer=optimizer, cost="pixels", frames=[2, 4, 8]), RECORDED)
    return Planned(planner, MotionScores([2, 4, 8]), 4, by_pose=True, **options)


class Showing(Plane):
    """Its frames show where it is: x, y and yaw, over 10, in their first pixels."""

    def goal(self, episode: Episode) -> torch.Tensor:
        return self.frame_at(torch.tensor(episode.goal))

    def frame_at(self, pose: torch.Tensor) -> torch.Tensor:
        return pose.float()[..., None, :].expand(*pose.shape[:-1], 3, 3)[..., None] / 10

    def _seen(self, motion: torch.Tensor) -> Seen:
        return replace(super()._seen(motion), frame=self.frame_at(self.pose))


def by_picture(environment: Showing, blur: float = 0.0, **options) -> Planned:
    """Predicted frames cost `blur` more than true ones."""

    def cost(frames: torch.Tensor, goals: torch.Tensor) -> torch.Tensor:
        return 10 * (frames - goals[:, None])[:, :, 0, :, 0].norm(dim=-1) + blur

    def scores(past, task, goal, random):
        pose = torch.from_numpy(past[-1].pose)

        def score(actions: torch.Tensor) -> torch.Tensor:
            poses = placed(integrate(actions.double()), pose)[:, :, [0, 1, 3, 7]]
            frames = environment.frame_at(poses).flatten(1, 2)
            return cost(frames, goal[None]).unflatten(1, poses.shape[1:3]).float()

        return score

    optimizer = OptimizerConfig(samples=60, iterations=3, elites=6)
    config = PlannerConfig(optimizer=optimizer, cost="pixels", frames=[1, 2, 4, 8], knots=1)
    return Planned(Planner.fit(config, RECORDED), scores, 4, **options)


@pytest.mark.parametrize("blur", [0.0, 5.0])
def test_planned_agents_stop_where_no_candidate_is_closer(space: FreeSpace, blur: float):
    environment = Showing()
    task = task_in(space, goal=(5.0, 6.5, 0.3))
    task.goal = environment.goal(task.episode)
    agent = by_picture(environment, blur)
    trace = run_episode(environment, agent, task, 0.5, 0.5)
    outcome = judged(trace, task, "x", 0, config_of())
    assert outcome.success
    assert outcome.distance < 0.2  # without a look at the true pose
    assert agent.towards(trace.past, task.goal) is None
    assert agent.towards(trace.past, environment.frame_at(torch.tensor([6.0, 6.5, 0.3]))) is not None


def test_a_detour_is_no_reason_to_stop(space: FreeSpace):
    environment, avoid = Showing(), [4.0, 6.2, 4.6, 7.0]
    task = task_in(space, goal=(5.5, 6.5, 0.0))
    task.goal = environment.goal(task.episode)
    outcomes = []
    for forbidden in ([], avoid):
        trace = run_episode(environment, by_picture(environment, avoid=forbidden), task, 0.5, 0.5)
        outcomes.append(judged(trace, task, "x", 0, config_of(avoid=avoid)))
    assert outcomes[0].violations > 0
    assert (outcomes[1].violations, outcomes[1].success) == (0, True)


def test_proposals_are_ranked_and_forbidden_ones_avoided(space: FreeSpace):
    environment, task = Showing(), task_in(space, goal=(4.5, 6.5, 0.0))
    task.goal = environment.goal(task.episode)
    ahead, aside, back = torch.tensor([[0.3, 0.0, 0.0], [0.2, 0.1, 0.0], [-0.3, 0.0, 0.0]])[:, None].expand(3, 8, 3)

    class Proposing(GoalNetwork):
        def proposals(self, frames, goals, count, random):
            return torch.stack((back, aside, ahead))[None]

    network = Proposing(NETWORK.description)
    for avoid, best in (([], ahead), ([2.1, 6.3, 4.5, 6.51], aside)):
        agent = by_picture(environment, avoid=avoid, network=network, proposals="rank")
        agent.begin(task)
        past = environment.reset(task.episode)
        torch.testing.assert_close(agent.towards(past, task.goal).actions, best[:4])
    past[-1] = replace(past[-1], pose=np.array(task.episode.goal))  # already there
    assert agent.towards(past, task.goal) is None


def test_half_of_the_first_candidates_are_proposed(space: FreeSpace):
    environment, task, turn = Showing(), task_in(space), torch.tensor([0.2, 0.0, 0.05]).expand(8, 3)
    task.goal = environment.goal(task.episode)
    tried = []

    class Proposing(GoalNetwork):
        def proposals(self, frames, goals, count, random):
            return turn.expand(1, count, 8, 3)

    agent = by_picture(environment, network=Proposing(NETWORK.description), proposals="guide")
    scores = agent.scores

    def watching(*given):
        score = scores(*given)
        return lambda actions: tried.append(actions) or score(actions)

    agent.scores = watching
    agent.begin(task)
    agent.towards(environment.reset(task.episode), task.goal)
    assert torch.isclose(tried[0], turn, atol=1e-6).all((2, 3)).sum() == 30
    assert not torch.isclose(tried[1], turn, atol=1e-6).all((2, 3)).any()


def test_a_graph_is_followed_to_the_goal_past_frames_that_no_plan_leads_closer_to(space: FreeSpace):
    environment, task = Showing(), task_in(space, goal=(5.0, 6.5, 0.0))
    task.goal = environment.goal(task.episode)
    reached, between = (environment.frame_at(torch.tensor(pose)) for pose in ((2.0, 6.5, 0.0), (3.5, 7.0, 0.0)))

    class Way:
        """A route of two frames, the first of which is that of the start: no candidate leads closer to it."""

        def __init__(self):
            self.shown = [0]

        def next(self, frame: torch.Tensor):
            if self.shown[-1] == 1 and 10 * (frame - between)[:, 0, 0].norm() < 0.5:
                self.shown.append(2)
            return ((0, reached), (1, between), (None, task.goal))[self.shown[-1]]

        def skip(self):
            self.shown.append(1)
            return 1, between

    way, planned = Way(), by_picture(environment)
    graph = SimpleNamespace(to_goal=lambda goal: way)
    agent = Remembering(planned.planner, planned.scores, 4, graph=graph)
    trace = run_episode(environment, agent, task, 0.5, 0.5)
    assert judged(trace, task, "x", 0, config_of()).success
    assert way.shown == [0, 1, 2]


@pytest.mark.parametrize("agent", ["random", "straight", "policy", "ranked", "guided", "graph"])
def test_agents_that_learned_need_a_network(agent):
    with pytest.raises(UserError, match=rf"planner\.learned.*{agent}"):
        config_of(agents=[agent]).validate()
    config_of(agents=["world", "engine", "expert"]).validate()


@pytest.mark.parametrize("agent", [Expert(4), by_distance()], ids=["expert", "planned"])
def test_agents_that_know_the_distance_arrive(space: FreeSpace, agent):
    task = task_in(space, start=(2.0, 2.0, 0.0), goal=(8.0, 2.0, -1.0))
    trace = run_episode(Plane(), agent, task, 0.5, math.radians(30))
    outcome = judged(trace, task, "expert", 0, config_of())
    assert outcome.success
    assert outcome.spl > 0.7


def test_an_agent_stays_out_of_where_it_must_not_go(space: FreeSpace):
    task, avoid = task_in(space), [4.0, 6.2, 6.0, 7.0]
    outcomes = [
        judged(run_episode(Plane(), by_distance(avoid=a), task, 0.5, 0.5), task, "x", 0, config_of(avoid=avoid))
        for a in ([], avoid)
    ]
    assert outcomes[0].violations > 0
    assert (outcomes[1].violations, outcomes[1].success) == (0, True)


def test_the_next_plan_starts_from_what_is_left_of_the_last(space: FreeSpace):
    agent, task, plans = by_distance(), task_in(space), []
    plan = agent.planner.plan

    def planning(score, batch, random, start, *further):
        plans.append((start, plan(score, batch, random, start, *further)))
        return plans[-1][1]

    agent.planner.plan = planning
    agent.begin(task)
    past = Plane().reset(task.episode)
    done = len(agent.towards(past, task.goal).actions)
    agent.towards(past, task.goal)
    (nothing, first), (start, _) = plans
    assert nothing is None
    expected = torch.cat((first.actions[:, done:], first.actions[:, -1:].expand(-1, done, -1)), dim=1)
    torch.testing.assert_close(start, expected)


def test_a_world_sees_the_last_frames(world):
    model, contexts = world(), []
    score = SimpleNamespace(
        predictor=SimpleNamespace(world=model),
        to_goals=lambda context, goals, random, spacing: contexts.append((context, spacing)),
    )
    frames = torch.arange(5.0)[:, None, None, None].expand(-1, 3, 32, 32)
    past = [Seen(frame, torch.zeros(3), np.zeros(3), contact=False) for frame in frames]
    WorldScores(score, 0.4)(past, None, frames[0], torch.manual_seed(0))
    torch.testing.assert_close(contexts[0][0], frames[None, 2:])
    assert contexts[0][1] == 0.4


def test_an_episode_is_judged_by_hand(space: FreeSpace):
    task, actions = task_in(space, goal=(4.0, 6.5, 0.0)), torch.tensor([[1.0, 1.0, 0.0], [1.0, -1.0, 0.2]])

    class Scripted(Candidates):
        def act(self, past, radius, angle):
            return Move(actions if len(past) == 1 else actions[:0])

        def stops(self, seen, radius, angle):
            return False

    trace = run_episode(Plane(), Scripted(*SHARED, recorded=RECORDED, straight=False), task, 0.5, 0.5)
    outcome = judged(trace, task, "x", 0, config_of())
    assert (outcome.steps, outcome.stopped, outcome.success) == (2, True, True)
    assert outcome.walked == pytest.approx(2 * math.sqrt(2))
    assert outcome.spl == pytest.approx(task.episode.distance / (2 * math.sqrt(2)))
    assert outcome.soft_spl == pytest.approx(outcome.spl)
    assert outcome.degrees == pytest.approx(math.degrees(0.2), rel=1e-4)
    elsewhere = judged(trace, replace(task, episode=replace(task.episode, goal=(4.0, 6.5, 1.5))), "x", 0, config_of())
    assert (elsewhere.success, elsewhere.spl) == (False, 0)
    assert elsewhere.soft_spl > 0


def test_budgets_end_episodes(space: FreeSpace, monkeypatch: pytest.MonkeyPatch):
    task = task_in(space)
    monkeypatch.setattr(NETWORK, "arrival", lambda frames, goals: torch.zeros(len(frames)))  # never believes to arrive
    trace = run_episode(Plane(), Candidates(*SHARED, recorded=RECORDED, straight=True), task, 0.5, 0.5)
    assert len(trace.past) == task.episode.budget + 1
    assert not judged(trace, task, "x", 0, config_of()).stopped


def test_policies_stop_when_they_believe_to_be_there(space: FreeSpace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(NETWORK, "arrival", lambda frames, goals: torch.ones(len(frames)))
    trace = run_episode(Plane(), Policy(*SHARED), task_in(space), 0.5, 0.5)
    assert isinstance(trace, Trace)
    assert len(trace.past) == 1


@pytest.mark.parametrize(("likely", "stops"), [(0.9, True), (0.6, False)])
def test_planned_agents_also_stop_by_the_learned_probability(space: FreeSpace, monkeypatch, likely, stops):
    monkeypatch.setattr(NETWORK, "arrival", lambda frames, goals: torch.full((len(frames),), likely))
    environment, task = Showing(), task_in(space)
    task.goal = environment.goal(task.episode)
    agent = by_picture(environment, network=NETWORK, arrived=0.7)
    agent.begin(task)
    assert (len(agent.act(environment.reset(task.episode), 0.5, 0.5).actions) == 0) == stops


def test_a_graph_leads_along_walks_and_across_them(dataset, monkeypatch: pytest.MonkeyPatch):
    # Frames of walk "a" are close to those of walk "b" by the network of this test if their times agree.
    def compared(frames, goals):
        here, there = ((x[:, 1, 0, 0] + 1) * 127.5 / 8 for x in (frames, goals))
        walks = ((x[:, 0, 0, 0] + 1) * 127.5 / 60 for x in (frames, goals))
        apart = (next(walks) - next(walks)).abs()
        steps = (there - here).abs() + 20 * ((there < here - 0.5) | (apart > 1.5))
        return SimpleNamespace(steps=lambda: steps, apart=lambda: steps / 2)

    network = GoalNetwork(GoalDescription(4, (1.0,) * 3, (1.0,) * 3, 0.5, 0.5))
    monkeypatch.setattr(network, "forward", compared)
    graph = Graph.build(dataset, network, count=20, every=2)
    first = len(range(0, len(dataset.trajectories[0]), 2))
    assert graph.edges[0][0] == (1, 2.0)
    assert any(other >= first for node in range(first) for other, _ in graph.edges[node])
    goal = dataset.frames.read(1, [24])[0] / 127.5 - 1
    route = graph.to_goal(goal)
    start = dataset.frames.read(0, [0])[0] / 127.5 - 1
    target, image = route.next(start)
    assert target is not None
    assert image.shape == start.shape
    assert route.distance[target] < route.distance[0]
    assert route.next(goal)[0] is None
    route = graph.to_goal(goal)
    target, _ = route.next(start)
    beyond, _ = route.skip()  # as if the target were reached
    assert route.node == target
    assert beyond is None or route.distance[beyond] < route.distance[target]
    for _ in range(10):
        beyond, image = route.skip()
    assert beyond is None
    torch.testing.assert_close(image, goal)


class Shown:
    """Its frames are of one colour, which is all that `Alike` compares."""

    def __init__(self, *walks: list[int]):
        self.trajectories = walks
        self.frames = self

    def read(self, index: int, times: list[int]) -> torch.Tensor:
        colours = torch.tensor(self.trajectories[index])[times]
        return colours.byte()[:, None, None, None].expand(-1, 3, 8, 8)


class Alike(GoalNetwork):
    def forward(self, frames, goals):
        apart = (to_uint8(frames).float() - to_uint8(goals).float())[:, 0, 0, 0].abs()
        return SimpleNamespace(steps=lambda: apart, apart=lambda: apart)


def test_walks_are_connected_where_frames_around_match_too():
    # Frame 4 of both walks shows 100. Around it the second walk differs, the third is the same, but earlier.
    here, other = [20, 40, 60, 80, 100, 120, 140, 160, 180], [11, 31, 51, 71, 100, 131, 151, 171, 191]
    graph = Graph.build(Shown(here, other, here[2:]), Alike(NETWORK.description), count=100, every=1)
    welds = {(node, other) for node, edges in enumerate(graph.edges) for other, _ in edges if other != node + 1}
    assert (4, 20) in welds
    assert (20, WELD) in graph.edges[4]  # a single step, the fewest
    assert not any(9 <= i < 18 for edge in welds for i in edge)


def test_routes_are_shortest_and_walkers_are_found_again():
    graph = Graph.build(Shown(list(range(0, 200, 10)), [250]), Alike(NETWORK.description), count=100, every=1)
    graph.edges = [[(node + 1, 3.0)] if node < 19 else [] for node in range(21)]
    graph.edges[2].append((12, 4.0))
    colour = lambda value: to_float(torch.full((3, 8, 8), value, dtype=torch.uint8))  # noqa: E731
    route = graph.to_goal(colour(150))
    assert route._way(0, float("inf")) == [0, 1, 2, 12, 13, 14, 15]
    assert route.distance[0] == 3.0 + 3.0 + 4.0 + 3 * 3.0
    target, _ = route.next(colour(0))
    assert (route.node, target) == (0, 2)  # eight steps ahead
    route.next(colour(23))  # close to the route
    assert route.node == 2
    route.next(colour(90))  # lost
    assert route.node == 9


def test_routes_have_the_lengths_of_networkx():
    networkx, random = pytest.importorskip("networkx", reason="torch requires it"), np.random.default_rng(0)
    edges = [[(int(other), float(random.uniform(1, 9))) for other in random.integers(40, size=2)] for _ in range(40)]
    ends = torch.from_numpy(random.uniform(0, 30, 40))
    graph = Graph(torch.zeros(40, 3, 8, 8, dtype=torch.uint8), torch.zeros(40), edges, Alike(NETWORK.description))
    graph.compare = lambda here, there: (None, ends / WORTH)
    route = graph.to_goal(torch.zeros(3, 8, 8))
    reference = networkx.MultiDiGraph()
    reference.add_weighted_edges_from((i, other, length) for i, out in enumerate(edges) for other, length in out)
    reference.add_weighted_edges_from((i, "goal", end) for i, end in enumerate(ends.tolist()))
    lengths = networkx.shortest_path_length(reference, target="goal", weight="weight")
    assert route.distance == pytest.approx([lengths[node] for node in range(40)])
    assert any(following is not None for following in route.following)


def test_episodes_are_kept_and_chosen(tmp_path: Path, space: FreeSpace):
    episodes = [replace(task_in(space).episode, seed=i, stratum=2.0 + i % 2) for i in range(6)]
    save_episodes(episodes, tmp_path / "episodes.json")
    assert load_episodes(tmp_path / "episodes.json") == episodes
    assert select(episodes, 2) == [0, 1, 2, 3]
    (tmp_path / "episodes.json").write_text('{"version": 1, "episodes": [{"map": 3}]}')
    with pytest.raises(UserError, match=r"episodes\.json"):
        load_episodes(tmp_path / "episodes.json")


@pytest.mark.slow
def test_the_engine_as_the_world_and_the_true_distance_as_the_cost_succeed(tmp_path: Path):
    pytest.importorskip("vizdoom", reason="the engine is part of the extra 'doom'")
    episodes = draw_episodes("my_way_home", [2.0], 1, seed=0)
    assert [e.visible for e in episodes] == [True, False]
    assert episodes == draw_episodes("my_way_home", [2.0], 1, seed=0)
    optimizer = OptimizerConfig(samples=24, iterations=2, elites=4)
    planner = Planner.fit(PlannerConfig(optimizer=optimizer, cost="pixels", frames=[2, 4, 8]), RECORDED)
    with DoomEnvironment("my_way_home", 64) as environment, DoomEnvironment("my_way_home", 64) as other:
        space = FreeSpace(environment.geometry)
        for episode in episodes:
            start = environment.reset(episode)[-1].pose
            np.testing.assert_allclose(start, episode.start, atol=1e-6)
            distances = space.distances(np.array(episode.goal[:2]))
            task = Task(other.goal(episode), 0, episode, distances)
            agent = Planned(planner, EngineScores(other, [2, 4, 8]), 4, by_pose=True)
            trace = run_episode(environment, agent, task, 0.5, math.radians(30))
            assert judged(trace, task, "engine_distance", 0, config_of()).success


@pytest.mark.slow
def test_distances_that_a_map_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    pytest.importorskip("vizdoom", reason="the engine is part of the extra 'doom'")
    monkeypatch.setattr(episodes_module, "PATIENCE", 40)
    with pytest.raises(UserError, match=r"distances is \[64.0\]: no episodes"):
        COMMANDS_OF["episodes"](EpisodesConfig(file=str(tmp_path / "far.json"), distances=[64.0]))
    assert not (tmp_path / "far.json").exists()
    COMMANDS_OF["episodes"](EpisodesConfig(file=str(tmp_path / "some.json"), distances=[2.0, 64.0], count=1))
    assert len(load_episodes(tmp_path / "some.json")) == 2
    assert "found only 0 of 1 episodes at 64 m with the goal in view" in capsys.readouterr().out


@pytest.mark.slow
def test_nothing_moves_once_the_map_has_ended(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("vizdoom", reason="the engine is part of the extra 'doom'")
    episode = draw_episodes("my_way_home", [2.0], 1, seed=0)[0]
    with DoomEnvironment("my_way_home", 64) as environment:
        before = environment.reset(episode)[-1]
        monkeypatch.setattr(environment.engine, "step", lambda *command: None)
        after = environment.step(torch.tensor([0.1, 0.0, 0.1]))
        assert torch.equal(after.frame, before.frame)
        assert torch.equal(after.motion, torch.zeros(3))
        frames, poses = environment.simulate(before.pose, torch.ones(2, 3, 3), [2, 3])
        assert frames.shape[:2] == (2, 2)
        np.testing.assert_allclose(poses, np.broadcast_to(before.pose, (2, 2, 3)), atol=0.05)


@pytest.mark.slow
def test_the_command_keeps_what_it_has_done(walks: Path, tmp_path: Path):
    pytest.importorskip("vizdoom", reason="the engine is part of the extra 'doom'")
    NETWORK.save(tmp_path / "learned")
    save_episodes(draw_episodes("my_way_home", [1.0], 1, seed=0), tmp_path / "episodes.json")
    optimizer = OptimizerConfig(samples=4, iterations=1, elites=2)
    planner = PlannerConfig(optimizer=optimizer, cost="steps", learned=str(tmp_path / "learned"), frames=[8])
    world = WorldModel.from_pretrained("maze")
    world.description.units.spacing = None  # as after training on datasets of several spacings
    world.save_pretrained(tmp_path / "world")
    config = config_of(
        checkpoint=str(tmp_path / "world"), data=str(walks), split="test", out=str(tmp_path / "out"), device="cpu",
        planner=planner, episodes=str(tmp_path / "episodes.json"), agents=["random", "world", "graph"], videos=1,
        graph_frames=20,
    )  # fmt: skip
    mistaken = replace(planner, learned=str(tmp_path / "typo"))
    with pytest.raises(UserError, match="typo"):
        act(replace(config, planner=mistaken))
    text = write_act(config, *act(config))  # the mistake is not remembered
    assert "planned with the world" in text
    outcomes = (tmp_path / "out" / "outcomes.jsonl").read_text()
    assert len(outcomes.splitlines()) == 6
    assert len(list((tmp_path / "out" / "videos").glob("*.mp4"))) == 6
    assert write_act(config, *act(config)) == text
    assert (tmp_path / "out" / "outcomes.jsonl").read_text() == outcomes
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["outcomes"]) == 6
    (tmp_path / "out" / "outcomes.jsonl").write_text(outcomes[:-20])  # as if killed while writing
    act(config)
    again = (tmp_path / "out" / "outcomes.jsonl").read_text().splitlines()
    assert again[:-1] == outcomes.splitlines()[:-1]
    last, expected = json.loads(again[-1]), json.loads(outcomes.splitlines()[-1])
    assert (last["agent"], last["episode"], last["success"]) == (
        expected["agent"], expected["episode"], expected["success"]
    )  # fmt: skip
    with pytest.raises(UserError, match="other options"):
        act(replace(config, execute=2))
