"""Plans from where a drive is: what is chosen, against predictions made one by one, and who may stop it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cdit.batch import Condition
from cdit.common.errors import UserError
from cdit.common.frames import to_float, to_uint8
from cdit.common.motion import between
from cdit.common.randomness import generator
from cdit.data.motion import compose
from cdit.drive.config import DriveConfig
from cdit.drive.dream import with_heads
from cdit.drive.drive import Begin, Drive, Stage, arc, speeds
from cdit.drive.plan import ENDS, Cancelled
from cdit.plan.config import OptimizerConfig, PlannerConfig
from cdit.plan.goal_network import GoalDescription, GoalNetwork
from cdit.plan.planner import WorldScore


def at_once(function, *args):
    return function(*args)


@pytest.fixture(scope="module")
def planning(checkpoint: Path, walks: Path) -> Stage:
    planner = PlannerConfig(cost="pixels", optimizer=OptimizerConfig(samples=6, iterations=2, elites=3), frames=[2, 4])
    return Stage(DriveConfig(checkpoint=str(checkpoint), data=str(walks), planner=planner, horizon=4))


def driven(stage: Stage, steps: int, hold: int = 1) -> Drive:
    drive = Drive(stage)
    drive.dreams[0].sampler = replace(stage.description.sampler, hold=hold)
    drive.begin(Begin(start=5))
    for i in range(steps):
        drive.step(1.0, 0.0, 0.3 * i)
    return drive


@pytest.mark.parametrize(("steps", "hold"), [(0, 1), (3, 1), (2, 9), (2, 3)])
def test_the_plan_is_the_candidate_whose_frame_is_closest_to_the_goal(planning, steps, hold):
    """With hold 9 candidates go on from the same past as the dream; with 3 this past would be too long ago."""
    drive = driven(planning, steps, hold)
    dream, world, goal = drive.dreams[0], planning.worlds[0], drive.goal(20)
    assert torch.equal(goal, planning.data.window(planning.starts[20], []).context[-1])
    before = dream.frame.clone()
    found = drive.plan(goal, at_once)

    noise, state = torch.randn(2, *world.latent_shape, generator=generator(0, 2, steps)), dream.state
    if hold == 9:
        noise = state.noise[0].expand_as(noise)
    elif hold == 3:
        state = world.begin(to_float(dream.context)[None])
        for moment in dream.moments:
            state = world.advance(state, moment.sampled, sampler=replace(dream.sampler, hold=1))
    distances, frames = [], []
    for path in found.paths:
        by_moment = []
        for moment, start in zip((2, 4), noise, strict=True):
            condition = Condition(torch.tensor([[moment / 4]]), path[None, None, moment - 1])
            frame = world.decode(world.sample(state, condition, dream.sampler, noise=start[None]))[0, 0]
            by_moment.append((float((frame - to_float(goal)).square().mean()), moment, frame))
        closest = min(by_moment, key=lambda found: found[0])
        distances.append(closest[0])
        frames.append(closest)
    np.testing.assert_allclose(found.costs, distances, rtol=1e-4)
    assert min(distances) == pytest.approx(distances[0])
    assert distances[1:] == pytest.approx(sorted(distances[1:]), rel=1e-4)
    assert len(found.actions) == frames[0][1]
    np.testing.assert_allclose(compose(found.actions.numpy())[-1], found.paths[0, len(found.actions) - 1], atol=1e-5)
    assert len(set(found.shown)) == len(found.ends) == min(ENDS, len(found.paths))
    assert found.shown[0] == 0
    assert found.shown[-1] >= len(found.paths) - 2
    assert ((found.paths[1:] - found.paths[0]).abs().amax((1, 2)) > 1e-5).all()  # the plan stands once
    for end, candidate in zip(found.ends, found.shown, strict=True):
        frame = frames[candidate][2]
        assert (end.int() - to_uint8(frame).int()).abs().max() <= 1
    # Nothing of the drive has changed.
    assert torch.equal(dream.frame, before)
    again = driven(planning, steps, hold)
    for one in (drive, again):
        one.step(0.5, 0.0, 0.0)
    assert torch.equal(drive.dreams[0].frame, again.dreams[0].frame)


def test_what_came_next_is_the_recorded_frame_a_plan_ahead(planning):
    drive = driven(planning, 2)
    assert torch.equal(drive.ahead(), planning.data.window(planning.starts[5], [4]).target[-1])
    drive.begin(Begin(picture=drive.dreams[0].frame))
    with pytest.raises(UserError, match="nothing was recorded"):
        drive.ahead()


@pytest.mark.parametrize("stride", [1, 2])
def test_plans_in_strides_are_predicted_step_by_step(checkpoint, walks, stride):
    planner = PlannerConfig(cost="pixels", stride=stride, optimizer=OptimizerConfig(samples=4, iterations=1, elites=2))
    stage = Stage(DriveConfig(checkpoint=str(checkpoint), data=str(walks), planner=planner, horizon=4))
    drive = driven(stage, 0)
    goal = drive.goal(20)
    found = drive.plan(goal, at_once)
    world, dream = stage.worlds[0], drive.dreams[0]
    score = WorldScore.of(world, planner, [4])
    towards = score.to_goals(to_float(dream.context)[None], to_float(goal)[None], generator(0, 2, 0))
    steps = between(torch.cat((torch.zeros(len(found.paths), 1, 3), found.paths[:, :-1]), 1), found.paths)
    np.testing.assert_allclose(found.costs, towards(steps[None])[0, :, 0], rtol=1e-3)
    held = driven(stage, 2, hold=5).plan(goal, at_once)  # its past is that of a drive that holds nothing
    joined = driven(stage, 0)
    joined.dreams[0]._state = world.join(driven(stage, 2, hold=5).dreams[0].state)
    joined.dreams[0].moments.extend(driven(stage, 2, hold=5).dreams[0].moments)
    np.testing.assert_allclose(held.costs, joined.plan(goal, at_once).costs, rtol=1e-4)


def test_a_head_that_is_off_stays_off_in_plans(planning):
    drive = driven(planning, 2)
    goal = drive.goal(20)
    costs = drive.plan(goal, at_once).costs
    drive.dreams[0].off = with_heads([(0, 0), (0, 1)])
    assert not torch.allclose(drive.plan(goal, at_once).costs, costs)


def test_with_a_goal_network_plans_are_also_by_its_distance(planning, tmp_path):
    torch.manual_seed(0)
    network = GoalNetwork(GoalDescription(4, (0.1,) * 3, (1.0,) * 3, 0.5, 0.5)).eval()
    network.save(tmp_path)
    stage = Stage(replace(planning.config, planner=replace(planning.config.planner, learned=str(tmp_path))))
    assert planning.costs == ["pixels"]
    assert stage.costs == ["pixels", "distance"]
    drive = driven(stage, 0)
    goal = drive.goal(20)
    found = drive.plan(goal, at_once, "distance")
    with torch.no_grad():
        ends = network(to_float(found.ends), to_float(goal).expand(len(found.ends), -1, -1, -1)).distance()
    np.testing.assert_allclose(found.costs[list(found.shown)], ends, rtol=0.02)


def test_planning_is_done_in_pieces_and_stops_when_it_is_not_wanted(planning):
    drive, calls = driven(planning, 1), []

    def run(function, *args):
        calls.append(args)
        if len(calls) == 3:
            raise Cancelled
        return function(*args)

    with pytest.raises(Cancelled):
        drive.plan(drive.goal(7), run)
    assert len(calls) == 3


@pytest.mark.parametrize("action", [(0.3, 0.0, 0.0), (0.2, -0.1, 0.4), (-0.1, 0.05, -2.0), (0.0, 0.0, 1.0)])
def test_the_speeds_of_a_motion_give_it_back(action):
    assert arc(*speeds(action, 4.0), 4.0) == pytest.approx(action, abs=1e-9)


def test_without_enough_recorded_motions_candidates_are_arcs(checkpoint, walks):
    config = DriveConfig(checkpoint=str(checkpoint), data=str(walks), horizon=24, planner=PlannerConfig(cost="pixels"))
    stage = Stage(config)
    recorded = stage.planner.prior.recorded
    paths = stage.planner.family.actions(recorded)
    assert len(recorded) > 50
    turns, speed = paths[..., 2], paths[..., :2].norm(dim=-1)
    assert (turns - turns[:, :1]).abs().max() < 1e-5  # constant
    assert speed.max() <= stage.spacing + 1e-3
    assert turns.min() < -0.3 < 0.3 < turns.max()


def test_a_plan_needs_a_beginning_and_a_cost(planning):
    with pytest.raises(UserError, match="choose a start"):
        Drive(planning).plan(torch.zeros(3, 32, 32, dtype=torch.uint8), at_once)
    with pytest.raises(UserError, match=r"planner\.cost is 'colour'"):
        replace(planning.config, planner=PlannerConfig(cost="colour")).check()
