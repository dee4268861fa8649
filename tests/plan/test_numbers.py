"""Planning with actions other than motion."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_world import SIDE
from two_joints import KINDS, Arm, arm_world, drawn, space_of

from cdit.batch import Condition
from cdit.common.errors import UserError
from cdit.data.action_space import ActionSpace
from cdit.plan.actions import composed, since
from cdit.plan.config import CurveConfig, OpenConfig, OptimizerConfig, PlannerConfig
from cdit.plan.draw import numbers_over_time
from cdit.plan.errors import action_errors, measures_of
from cdit.plan.openloop import Benchmark, run_curve, run_open
from cdit.plan.openloop_report import write_open
from cdit.plan.prediction import Predictor
from cdit.world_model import WorldModel


@pytest.fixture(params=KINDS)
def world(request: pytest.FixtureRequest) -> WorldModel:
    return arm_world(request.param)


def options_of(world: WorldModel, folder: Path, monkeypatch: pytest.MonkeyPatch, **planner: Any) -> dict[str, Any]:
    monkeypatch.setattr("cdit.plan.openloop.load_world", lambda *args, **kwargs: world)
    optimizer = OptimizerConfig(samples=64, iterations=6, elites=8)
    config = PlannerConfig(optimizer=optimizer, cost="pixels", **{"candidates": "steps"} | planner)
    options = {"data": str(folder), "source": "two_joints", "checkpoint": "arm", "out": str(folder), "device": "cpu"}
    return options | {"planner": config, "episodes": 6, "seconds": 1.0, "pictures": 1}


@pytest.mark.parametrize("kind", [*KINDS, "motion"])
def test_actions_of_a_plan_compose_as_recorded_ones(kind):
    space = ActionSpace() if kind == "motion" else space_of(kind)
    steps = torch.randn(5, 6, len(space.names), generator=torch.manual_seed(0))
    whole = composed(steps, space)
    for one, expected in zip(steps, whole, strict=True):
        np.testing.assert_allclose(space.compose(one.numpy()), expected, atol=1e-5)
    later = composed(steps[:, 2:], space)  # steps 2 … 5 alone lead from the end of step 1 to each of them
    torch.testing.assert_close(since(whole[:, 1:2], whole[:, 2:], space), later, atol=1e-5, rtol=1e-5)


def test_errors_are_shares_of_the_range():
    truth, plan = torch.zeros(2, 4, 2), torch.zeros(2, 4, 2)
    plan[0, :, 0], plan[0, -1, 1] = 0.2, -0.4
    for kind in ("absolute", "relative"):  # ranges of 2 and 2.5: 10 % at all steps, and 16 % at the last
        found = action_errors(plan, truth, space_of(kind))
        torch.testing.assert_close(found, torch.tensor([[7.0, 13.0, 0.2, 0.4], [0.0] * 4]))
    summed = action_errors(plan, truth, space_of("sum"))  # ranges of 0.2 and 0.25 a step, 0.8 and 1 in all
    torch.testing.assert_close(summed, torch.tensor([[17.5, 32.5, 0.2, 0.4], [0.0] * 4]))
    assert list(measures_of(space_of("sum")))[2:] == ["lift [rad]", "grip"]


def test_many_numbers_and_one_that_never_changes():
    space = ActionSpace([f"n{i}" for i in range(10)], [""] * 10, [0.0] * 10, [0.0] + [2.0] * 9, "absolute")
    plan = torch.ones(1, 3, 10)
    found = action_errors(plan, torch.zeros(1, 3, 10), space)
    assert found.shape == (1, len(measures_of(space))) == (1, 10)
    torch.testing.assert_close(found[0, :2], torch.full((2,), (100 + 9 * 50) / 10))
    picture = numbers_over_time(plan, torch.zeros(1), plan[0], plan[0], space)
    assert picture.size == (320, 320)


@pytest.mark.parametrize("stride", [None, 2])
def test_a_prediction_is_conditioned_on_what_was_done(world, stride):
    """A jump on the whole; a step of two frames on what was done in these two."""
    given, space = [], world.description.actions
    sample = world.sample

    def remembered(state, condition: Condition, *args, **kwargs):
        given.append(condition.action)
        return sample(state, condition, *args, **kwargs)

    world.sample = remembered
    actions = torch.randn(1, 3, 4, 2, generator=torch.manual_seed(0)) * 0.1
    predictor = Predictor(world, [4], stride)
    state = predictor.begin(torch.zeros(1, 3, 3, SIDE, SIDE))
    predictor.predict(state, actions, predictor.draw_noise(torch.manual_seed(1)))
    pairs = [actions[:, :, :2], actions[:, :, 2:]] if stride else [actions]
    expected = [part[:, :, -1] if space.kind == "absolute" else part.sum(2) for part in pairs]
    assert len(given) == len(expected)
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_plan_finds_the_actions_that_lead_to_the_goal(world, tmp_path, monkeypatch):
    """In a world that is known: every joint is where the actions take it."""
    space = world.description.actions
    begin, seen = world.begin, []

    def begin_from(context, *args, **kwargs):
        seen.append(context[0, -1, 0, 0, [0, -1]])
        return begin(context, *args, **kwargs)

    def moved(state, condition: Condition, *args, **kwargs):
        joints = condition.action + (0 if space.kind == "absolute" else seen[-1])  # (B, G, 2)
        return drawn(joints.flatten(0, 1)).unflatten(0, joints.shape[:2]).float() / 127.5 - 1

    world.begin, world.sample = begin_from, moved
    results = run_open(OpenConfig(**options_of(world, tmp_path, monkeypatch)))
    assert set(results.answers) == {"world", "prior", "random", "stay", "truth"}
    ends = {name: results.errors(name)[:, 1].mean() for name in results.answers}
    assert ends["world"] < min(ends["prior"], ends["random"], ends["stay"]) / 3
    assert ends["truth"] < 1e-3
    trajectory, case = Arm(int(results.cases[1].name.removeprefix("arm_")), space.kind), results.cases[1]
    moved_by = np.abs(trajectory.joints[case.now + 4] - trajectory.joints[case.now])
    np.testing.assert_allclose(results.errors("stay")[1, 2:], moved_by, atol=1e-5)
    text = write_open(results, tmp_path)
    assert "lift [rad]" in text
    assert "straight ahead" not in text
    assert len(json.loads((tmp_path / "results.json").read_text())["errors"]["world"][0]) == 4
    assert (tmp_path / "pictures/episode_0.png").is_file()


@pytest.mark.parametrize(
    ("planner", "message"),
    [
        ({"candidates": "constant"}, "candidates is constant"),
        ({"constraint": "turn_first"}, "constraint is turn_first"),
    ],
)
def test_what_is_for_motion_is_refused(world, tmp_path, monkeypatch, planner, message):
    with pytest.raises(UserError, match=message):
        run_open(OpenConfig(**options_of(world, tmp_path, monkeypatch, **planner)))


def test_a_saved_world_plans_numbers_but_has_no_curve(world, tmp_path):
    world.save_pretrained(tmp_path / "arm" / "best")
    options = {"data": "none", "source": "two_joints", "checkpoint": str(tmp_path / "arm"), "out": str(tmp_path)}
    planner = PlannerConfig(cost="pixels")
    benchmark = Benchmark(OpenConfig(**options, planner=planner, seconds=1.0, episodes=3, device="cpu"))
    assert benchmark.truth_actions.shape == (3, 4, 2)
    with pytest.raises(UserError, match="dx, dy, dyaw, not lift, grip"):
        run_curve(CurveConfig(data="none", checkpoint=str(tmp_path / "arm"), out=str(tmp_path), device="cpu"))
