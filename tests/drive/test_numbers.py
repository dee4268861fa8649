"""Driving with actions other than motion."""

import numpy as np
import pytest
import torch
from tiny_world import SIDE
from two_joints import KINDS, Arm, arm_world

from cdit.batch import Condition
from cdit.common.errors import UserError
from cdit.common.frames import to_float, to_uint8
from cdit.common.randomness import generator
from cdit.drive.config import DriveConfig
from cdit.drive.drive import Begin, Drive, Stage
from cdit.drive.wire import Malformed, Message


@pytest.fixture(params=KINDS)
def stage(request: pytest.FixtureRequest, tmp_path) -> Stage:
    arm_world(request.param).save_pretrained(tmp_path / "best")
    return Stage(DriveConfig(checkpoint=str(tmp_path), data="none", source="two_joints", device="cpu"))


def test_a_command_is_the_action(stage):
    drive = Drive(stage)
    drive.begin(Begin(start=4, seed=3))
    numbers = [(0.05, -0.02), (0.0, 0.03), (-0.1, 0.1)]
    for command in numbers:
        assert drive.step(*command)
    assert drive.action == numbers[-1]
    np.testing.assert_allclose(drive.actions(), numbers, rtol=1e-6)
    context = stage.data.window(stage.starts[4], []).context
    condition = Condition(action=torch.tensor(numbers)[None, None])
    expected = to_uint8(stage.worlds[0].rollout(to_float(context)[None], condition, generator=generator(3)))[0, 0]
    assert torch.equal(torch.stack([moment.frame for moment in drive.dreams[0].moments]), expected)
    assert drive.view().facts["action"] == numbers[-1]


def test_a_drive_rests_at_what_led_to_its_first_frame(stage):
    drive = Drive(stage)
    drive.begin(Begin(start=4))
    index, now = stage.data.locate(stage.starts[4])
    absolute = stage.space.kind == "absolute"
    led = Arm(int(stage.data.trajectories[index].name.removeprefix("arm_")), stage.space.kind).actions[now - 1]
    assert drive.action == (pytest.approx(tuple(led)) if absolute else (0.0, 0.0))
    drive.step(0.1, 0.1)
    drive.back()
    assert drive.action == (pytest.approx(tuple(led)) if absolute else (0.0, 0.0))
    drive.begin(Begin(picture=torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)))
    assert drive.action == (0.0, 0.25 if absolute else 0.0)  # the middle of the range
    assert drive.begun == 2


def test_doubt_continues_the_command(stage):
    """Over one second, four steps: the last target, or four times the change."""
    drive, given = Drive(stage), []
    drive.begin(Begin(start=0))
    sample = stage.worlds[0].sample

    def remembered(state, condition, *args, **kwargs):
        given.append(condition.action)
        return sample(state, condition, *args, **kwargs)

    stage.worlds[0].sample = remembered
    drive.doubt = 2
    assert drive.view((0.05, -0.02)).arrays["ends"].shape == (2, SIDE, SIDE, 3)
    times = 1 if stage.space.kind == "absolute" else 4
    torch.testing.assert_close(given[0], torch.tensor([0.05, -0.02]).expand(1, 2, 2) * times)


def test_ranges_and_what_needs_motion(stage):
    expected = {
        "absolute": [(-1, 1), (-1, 1.5)],
        "relative": [(-2, 2), (-2.5, 2.5)],
        "sum": [(-0.1, 0.1), (-0.1, 0.15)],
    }
    np.testing.assert_allclose(stage.bounds, expected[stage.space.kind])
    assert stage.costs == []
    assert "not the motion of a camera" in stage.no_truth
    drive = Drive(stage)
    drive.begin(Begin(start=0))
    with pytest.raises(UserError, match="actions are motion"):
        drive.plan(drive.goal(1), lambda work: work())


def test_zero_is_within_the_bounds_of_a_sum(tmp_path):
    world = arm_world("sum")
    world.description.actions.low = [0.05, -0.1]
    world.save_pretrained(tmp_path / "best")
    config = DriveConfig(checkpoint=str(tmp_path), data="none", source="two_joints", device="cpu")
    assert Stage(config).bounds[0] == (0.0, 0.1)


def test_worlds_side_by_side_have_the_same_actions(tmp_path):
    for kind in ("absolute", "sum"):
        arm_world(kind).save_pretrained(tmp_path / kind / "best")
    options = {"data": "none", "source": "two_joints", "device": "cpu"}
    with pytest.raises(UserError, match=r"kind of actions of .*sum is sum, that of .* absolute"):
        Stage(DriveConfig(checkpoint=str(tmp_path / "absolute"), also=[str(tmp_path / "sum")], **options))


@pytest.mark.parametrize("numbers", ["[0]", "[0, 2]", "[0, true]", "[0, null]", "3", "[0, NaN]", "[0, 0, 0]"])
def test_numbers_out_of_range(numbers):
    with pytest.raises(Malformed, match=r"numbers|message"):
        Message(f'{{"type": "drive", "numbers": {numbers}}}').numbers("numbers", [(-1, 1), (-1, 1)])
    assert Message('{"type": "drive", "numbers": [0, 1]}').numbers("numbers", [(-1, 1), (-1, 1)]) == (0.0, 1.0)
