import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cdit.common.errors import UserError
from cdit.common.frames import to_float
from cdit.common.motion import integrate
from cdit.data.layout import DatasetInfo, write_split, write_trajectory
from cdit.diffusion.config import SamplerOptions
from cdit.plan.config import CurveConfig, DiagnoseConfig, LearnConfig, OpenConfig, OptimizerConfig, PlannerConfig
from cdit.plan.goal_network import (
    FAR_EDGES,
    FARTHEST,
    TURN_EDGES,
    GoalDescription,
    GoalNetwork,
    class_of,
    load_goal_network,
)
from cdit.plan.learn import UNORDERED, Sampler, learn, loss_of, predict_frames
from cdit.plan.openloop import Benchmark, nwm_compatible, run_curve, run_open
from cdit.plan.openloop_report import write_curve, write_open
from cdit.plan.planner import Planner, WorldScore

PLANNER = PlannerConfig(optimizer=OptimizerConfig(samples=12, iterations=2, elites=3), cost="pixels")


@pytest.fixture
def config(walks: Path, checkpoint: Path, tmp_path: Path) -> dict:
    options = {"data": str(walks), "checkpoint": str(checkpoint), "out": str(tmp_path), "device": "cpu"}
    return options | {"prior_split": "test", "planner": PLANNER, "episodes": 5, "seconds": 1.0, "pictures": 1}


def test_every_method_answers_every_episode(config, tmp_path, dataset):
    results = run_open(OpenConfig(**config))
    assert {"world", "prior", "straight", "random", "stay", "truth"} == set(results.answers)
    case = results.cases[2]
    trajectory = dataset.trajectories[case.trajectory]
    moved = np.linalg.norm(trajectory.position[case.now + 4] - trajectory.position[case.now])
    assert results.errors("stay")[2, 2] == pytest.approx(moved, rel=1e-4)
    worlds = results.answers["world"].costs
    assert (worlds <= results.answers["truth"].costs + 1).all()
    text = write_open(results, tmp_path)
    assert "planned with the world" in text
    saved = json.loads((tmp_path / "results.json").read_text())
    assert len(saved["errors"]["world"]) == 5
    assert (tmp_path / "index.html").is_file()
    assert (tmp_path / "pictures" / "episode_0.png").is_file()


def test_candidates_among_the_baselines_obey_the_constraint(config):
    planner = replace(PLANNER, constraint="forward_first")
    benchmark = Benchmark(OpenConfig(**config | {"planner": planner}))
    fitted = Planner.fit(planner, benchmark.recorded)
    found = benchmark.baselines(fitted, WorldScore.of(benchmark.world, planner, fitted.moments))
    for name in ("prior", "random", "truth"):
        heading = found[name].paths[:, :, 2]
        assert heading[:, 1].abs().max() == 0, name  # the first five eighths of four steps
        assert heading[:, -1].abs().max() > 0, name


@pytest.mark.parametrize("stride", [0, -2, 3])
def test_a_stride_divides_the_plan(config, stride):
    config = config | {"planner": replace(PLANNER, stride=stride)}
    with pytest.raises(UserError, match=rf"planner\.stride is {stride}, expected"):
        Benchmark(OpenConfig(**config))
    config.pop("pictures")
    with pytest.raises(UserError, match=rf"planner\.stride is {stride}, expected"):
        Benchmark(DiagnoseConfig(**config | {"planner": PlannerConfig(stride=stride)}))


def test_less_than_a_frame_is_no_plan(config):
    with pytest.raises(UserError, match=r"seconds is 0.1, expected at least one frame, 0.25 s"):
        Benchmark(OpenConfig(**config | {"seconds": 0.1}))


def test_a_benchmark_repeats_itself(config):
    first, again = (run_open(OpenConfig(**config, seed=3)) for _ in range(2))
    torch.testing.assert_close(first.answers["world"].paths, again.answers["world"].paths)


def test_true_actions_lead_to_the_goal(config, dataset):
    benchmark = Benchmark(OpenConfig(**config))
    for case, actions in zip(benchmark.cases, benchmark.truth_actions, strict=True):
        window = dataset.window(case.window, [4])
        torch.testing.assert_close(integrate(actions)[-1], window.condition.action[0], atol=1e-4, rtol=0)


def test_the_protocol_of_the_release():
    planner = nwm_compatible(OpenConfig(checkpoint="", data="", out="", planner=PLANNER)).planner
    optimizer = planner.optimizer
    assert (optimizer.samples, optimizer.elites, optimizer.iterations, planner.repeats) == (120, 5, 1, 3)
    assert (planner.candidates, planner.stride, planner.cost, planner.sampler.steps) == ("constant", 1, "lpips", 250)


@pytest.mark.parametrize(
    ("kind", "planner", "named"),
    [
        (OpenConfig, {"cost": "pixels"}, "planner.cost is pixels"),
        (OpenConfig, {"optimizer": OptimizerConfig(samples=30)}, "planner.optimizer.samples is 30"),
        (CurveConfig, {"repeats": 2}, "planner.repeats is 2"),
        (CurveConfig, {"sampler": SamplerOptions(steps=3)}, "planner.sampler.steps is 3"),
        (DiagnoseConfig, {"cost": "pixels"}, "planner.cost is pixels"),
    ],
)
def test_options_that_would_be_ignored_are_refused(kind, planner, named):
    compat = {"nwm_compat": True} if kind is OpenConfig else {}
    with pytest.raises(UserError, match=named):
        kind(checkpoint="", data="", out="", planner=PlannerConfig(**planner), **compat).validate()


def test_a_plan_can_be_as_long_as_the_horizon():
    planner = PlannerConfig(frames=[2, 4])
    planner.validate_last(4)
    PlannerConfig().validate_last(16)
    with pytest.raises(UserError, match=r"horizon is 16, but plans end at one of planner\.frames"):
        planner.validate_last(16)


def test_a_curve_has_every_budget(config, tmp_path):
    config.pop("pictures")
    config["planner"] = replace(PLANNER, optimizer=replace(PLANNER.optimizer, iterations=3))
    curve = CurveConfig(**config, samples=[6, 12], iterations=[1], repeats=[1, 2], steps=[1])
    points = run_curve(curve)
    assert [(p.samples, p.repeats, p.calls) for p in points] == [(6, 1, 6), (6, 2, 12), (12, 1, 12), (12, 2, 24)]
    assert "candidates" in write_curve(points, tmp_path, {})
    assert (tmp_path / "curve.png").is_file()


def test_pairs_say_how_far_and_what_was_done(dataset):
    options = LearnConfig(data="", checkpoint="", out="", horizon=4, radius=0.2, degrees=20.0)
    pairs = Sampler(dataset, options).draw(400)
    # The walks' frames say which they are: green is 8 times the time, red says which walk.
    time, goal = ((frames[:, 1, 0, 0] / 8).round().long() for frames in (pairs.frames, pairs.goals))
    walk, goal_walk = ((frames[:, 0, 0, 0] / 60).round().long() - 1 for frames in (pairs.frames, pairs.goals))
    same, ordered = pairs.steps <= 64, pairs.steps != UNORDERED
    assert torch.equal(walk == goal_walk, same)
    torch.testing.assert_close((goal - time)[same & ordered], pairs.steps[same & ordered])
    for i in torch.nonzero(same)[:, 0].tolist():
        trajectory = dataset.trajectories[walk[i]]
        moved = np.linalg.norm(trajectory.position[goal[i]] - trajectory.position[time[i]])
        assert pairs.motion[i, :2].norm().item() == pytest.approx(moved, abs=1e-4)
        if ordered[i]:
            assert (pairs.actions[i, pairs.steps[i] :] == 0).all()
        else:
            assert moved < 4 * 0.2
            assert pairs.motion[i, 2].abs() < 3 * np.radians(20)
    assert {-1, 1} <= set((goal - time)[~ordered].sign().tolist())


def test_the_loss_is_smallest_for_the_right_classes(dataset):
    options = LearnConfig(data="", checkpoint="", out="", horizon=4)
    pairs = Sampler(dataset, options).draw(64)
    network = GoalNetwork(GoalDescription(4, (1.0,) * 3, (1.0,) * 3, options.radius, np.radians(options.degrees)))
    far = pairs.motion[:, :2].norm(dim=1) / 0.5
    classes = torch.tensor([sum(d > edge for edge in FAR_EDGES) for d in far])
    classes[pairs.steps > FARTHEST] = len(FAR_EDGES)

    def says(shift: int):
        found = network(to_float(pairs.frames), to_float(pairs.goals))
        logits = 20.0 * F.one_hot((classes + shift) % 13, 13)
        return lambda frames, goals: replace(found, far=logits)

    losses = []
    for shift in (0, 1):
        network.forward = says(shift)
        losses.append(loss_of(network, pairs, torch.manual_seed(0))["distance"].item())
        del network.forward
    assert losses[0] < 1e-3
    assert losses[1] == pytest.approx(20, abs=1e-3)


def test_losses_leave_out_what_a_pair_does_not_say(dataset):
    pairs = Sampler(dataset, LearnConfig(data="", checkpoint="", out="", horizon=4)).draw(64)
    network = GoalNetwork(GoalDescription(4, (1.0,) * 3, (1.0,) * 3, 0.5, 0.5))
    found = network(to_float(pairs.frames), to_float(pairs.goals))
    same, ordered = pairs.steps <= FARTHEST, pairs.steps != UNORDERED

    def loss(name: str, field: str, rows: torch.Tensor) -> float:
        values, log_std = getattr(found, field) if field in ("motion", "actions") else (getattr(found, field), None)
        values = values + torch.randn(values.shape) * rows.view(-1, *[1] * (values.ndim - 1))
        network.forward = lambda frames, goals: replace(
            found, **{field: values if log_std is None else (values, log_std)}
        )
        return loss_of(network, pairs, torch.manual_seed(0))[name].item()

    for name, field, known in (
        ("steps", "classes", ordered),
        ("motion", "motion", same),
        ("turn", "turned", same),
        ("actions", "actions", same & ordered),
        ("arrived", "arrived", torch.ones_like(same)),
    ):
        before = loss(name, field, torch.zeros_like(same))
        assert loss(name, field, ~known) == before
        assert loss(name, field, known) != before


def test_losses_are_those_of_torch(dataset):
    description = GoalDescription(4, (0.3, 0.4, 0.5), (1.0, 2.0, 1.5), 0.5, 0.4)
    network = GoalNetwork(description)
    pairs = Sampler(dataset, LearnConfig(data="", checkpoint="", out="", horizon=4)).draw(128)
    found = network(to_float(pairs.frames), to_float(pairs.goals))
    network.forward = lambda frames, goals: found
    losses = loss_of(network, pairs, torch.manual_seed(0))
    same, ordered = pairs.steps <= FARTHEST, pairs.steps != UNORDERED

    def gaussian(field: str, truth: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        mean, log_std = (x[rows] for x in getattr(found, field))
        return F.gaussian_nll_loss(mean, truth[rows], (2 * log_std).exp())

    motion, actions = torch.tensor(description.motion_scale), torch.tensor(description.action_scale)
    torch.testing.assert_close(losses["motion"], gaussian("motion", pairs.motion / motion, same))
    torch.testing.assert_close(losses["actions"], gaussian("actions", pairs.actions / actions, same & ordered))
    turns = pairs.motion[:, 2].abs()
    classes = torch.from_numpy(np.searchsorted(TURN_EDGES, (turns[same] / 0.4).numpy()))
    torch.testing.assert_close(losses["turn"], F.cross_entropy(found.turned[same], classes))
    close = same & (pairs.motion[:, :2].norm(dim=1) < 0.5)
    there = close & (turns < 0.4)
    assert 0 < there.sum() < close.sum()
    torch.testing.assert_close(losses["arrived"], F.binary_cross_entropy_with_logits(found.arrived, there.float()))


def test_predicted_frames_are_kept_by_where_they_lead(dataset, world):
    model = world()

    def predict(context, condition, mask, sampler, noise):
        ahead = (condition.time_shift * 4).round()
        return context[:, -1, None] + ahead[..., None, None, None] * torch.tensor([0, 8 / 127.5, 0])[:, None, None]

    model.predict = predict
    found = predict_frames(model, dataset, LearnConfig(data="", checkpoint="", out="", predicted=24))
    assert len(found) > 12
    for (index, time), frame in found.items():
        assert round(frame[1, 0, 0].item() / 8) == time
        assert round(frame[0, 0, 0].item() / 60) - 1 == index


def test_proposals_are_as_wide_as_the_network_says_and_keep_their_direction():
    network = GoalNetwork(GoalDescription(8, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0), 0.5, 0.5))
    for parameter in network.head.parameters():
        torch.nn.init.zeros_(parameter)
    blank = torch.zeros(1, 3, 64, 64)
    steps = network.proposals(blank, blank, 4000, torch.manual_seed(0))[0]
    torch.testing.assert_close(steps.std((0, 1)), torch.tensor([0.1, 0.2, 0.3]), rtol=0.05, atol=0)
    following, across = (torch.corrcoef(pair)[0, 1] for pair in (steps[:, :2, 0].T, steps[:, 0, :2].T))
    assert following > 0.4
    assert across.abs() < 0.1


def test_classes_of_steps():
    assert class_of(torch.tensor([0, 1, 2, 3, 4, 5, 64, 65])).tolist() == [0, 1, 2, 3, 3, 4, 7, 8]


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_a_goal_network_learns_and_is_saved(walks, checkpoint, tmp_path, steps):
    options = {"data": str(walks), "checkpoint": str(checkpoint), "device": "cpu", "split": "test"}
    config = LearnConfig(**options, out=str(tmp_path), steps=steps, batch_size=8, horizon=4, predicted=0)
    learn(config)
    network = load_goal_network(tmp_path)
    frames = torch.rand(2, 3, 32, 32) * 2 - 1
    proposed = network.proposals(frames, frames.flip(0), 6, torch.manual_seed(0))
    assert proposed.shape == (2, 6, 4, 3)
    torch.testing.assert_close(proposed[:, 0], network.propose(frames, frames.flip(0))[0])
    assert ((network.arrival(frames, frames) > 0) & (network.arrival(frames, frames) < 1)).all()


def test_walks_that_never_turn(checkpoint, tmp_path):
    position = np.stack((np.arange(24) * 0.25, np.zeros(24)), axis=1)
    frames = np.random.default_rng(0).integers(0, 255, (24, 32, 32, 3), np.uint8)
    write_trajectory(tmp_path / "walks", "a", frames, position, np.zeros(24))
    write_split(tmp_path / "walks", "test", ["a"])
    DatasetInfo("straight", fps=4.0, metric_waypoint_spacing=0.25).save(tmp_path / "walks")
    options = {"data": str(tmp_path / "walks"), "checkpoint": str(checkpoint), "device": "cpu", "split": "test"}
    learn(LearnConfig(**options, out=str(tmp_path / "out"), steps=3, batch_size=8, horizon=4, predicted=0))
    network = load_goal_network(tmp_path / "out")
    assert all(parameter.isfinite().all() for parameter in network.parameters())


def test_steps_are_those_of_the_likely_class():
    network = GoalNetwork(GoalDescription(4, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), 0.5, 0.5))
    torch.nn.init.zeros_(network.head.weight)
    network.head.bias.data[4] = 50
    network.head.bias.data[9 + 8] = 50
    network.head.bias.data[9 + 13 + 7] = 50
    blank = torch.zeros(1, 3, 64, 64)
    torch.testing.assert_close(network.steps(blank, blank), torch.tensor([6.5]))
    found = network(blank, blank)
    torch.testing.assert_close(found.metres(), torch.tensor([3.0]))
    torch.testing.assert_close(found.turn(), torch.tensor([1.7]))
    torch.testing.assert_close(found.apart(), torch.tensor([4.7]))
    # 1.5 m from the goal an angle of 1.7 · 30° counts a quarter of 0.5 radii each: the heading no longer counts at 2 m.
    torch.testing.assert_close(network.distance(blank, blank), torch.tensor([3.0 + 1.7 * 0.5 / 4]))


def test_walks_of_one_building_are_close_to_each_other(dataset):
    options = LearnConfig(data="", checkpoint="", out="", horizon=4, radius=0.2, degrees=20.0, shared_coordinates=True)
    pairs = Sampler(dataset, options).draw(400)
    time, goal = ((frames[:, 1, 0, 0] / 8).round().long() for frames in (pairs.frames, pairs.goals))
    walk, goal_walk = ((frames[:, 0, 0, 0] / 60).round().long() - 1 for frames in (pairs.frames, pairs.goals))
    known = pairs.steps <= FARTHEST
    assert (walk != goal_walk)[known].any()
    for i in range(400):
        here, there = dataset.trajectories[walk[i]], dataset.trajectories[goal_walk[i]]
        offset = complex(*(there.position[goal[i]] - here.position[time[i]])) * np.exp(-1j * here.yaw[time[i]])
        turn = (there.yaw[goal[i]] - here.yaw[time[i]] + np.pi) % (2 * np.pi) - np.pi
        close = abs(offset) <= 4 * 0.2 and abs(turn) <= 3 * np.radians(20)
        np.testing.assert_allclose(pairs.motion[i], [offset.real, offset.imag, turn], atol=1e-4)
        assert close if pairs.steps[i] == UNORDERED else known[i] == (walk[i] == goal_walk[i])


def test_places_of_a_frame_are_correlated_with_those_of_the_goal():
    network = GoalNetwork(GoalDescription(4, (1.0,) * 3, (1.0,) * 3, 0.5, 0.5))
    frames, goals = torch.rand(2, 2, 3, 64, 64, generator=torch.manual_seed(0)) * 2 - 1
    joined = network._correlated(frames, goals)
    here, there = network.encoder(frames)[1, :, 3, 5], network.encoder(goals)[1, :, 12, 7]
    expected = 4 * torch.dot(here, there) / (here.norm() * there.norm())
    torch.testing.assert_close(joined[1, 12 * 16 + 7, 3, 5], expected)
