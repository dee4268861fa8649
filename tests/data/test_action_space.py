import json
import math
from pathlib import Path

import numpy as np
import pytest

from cdit.common.errors import DataError, UserError
from cdit.data.action_space import ActionSpace
from cdit.data.actions import read_actions
from cdit.data.layout import DatasetInfo
from cdit.data.source import TrajectorySource

ARM = {"names": ["lift", "turn"], "units": ["m", "rad"], "low": [0.0, -2.0], "high": [0.5, 1.0]}


class Recorded(TrajectorySource):
    """Numbers of seven frames, or poses that turn by a quarter at every step."""

    position = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    yaw = np.array([0.0, math.pi / 2, math.pi])
    actions = np.random.default_rng(0).uniform(ARM["low"], ARM["high"], (7, 2))


def test_actions_are_what_led_to_the_goal_their_change_or_their_sum():
    numbers = Recorded.actions
    for origin in range(7):
        for goal in range(7):
            led_to_origin, led_to_goal = numbers[max(origin - 1, 0)], numbers[max(goal - 1, 0)]
            total = sum((numbers[t] for t in range(origin, goal)), np.zeros(2))
            total = total - sum((numbers[t] for t in range(goal, origin)), np.zeros(2))
            expected = {"absolute": led_to_goal, "relative": led_to_goal - led_to_origin, "sum": total}
            for kind, values in expected.items():
                found = ActionSpace(**ARM, kind=kind).between(Recorded(), [origin], [goal])
                np.testing.assert_allclose(found, [values], atol=1e-12)


def test_motion_is_the_default():
    found = ActionSpace().between(Recorded(), [0, 1], [1, 2])
    np.testing.assert_allclose(found, [[1, 0, math.pi / 2], [1, 0, math.pi / 2]], atol=1e-12)


@pytest.mark.parametrize("kind", ["absolute", "relative", "sum"])
def test_composed_steps_are_the_action_over_all_of_them(kind: str):
    space = ActionSpace(**ARM, kind=kind)
    steps = space.between(Recorded(), [2, 3, 4], [3, 4, 5])
    np.testing.assert_allclose(space.compose(steps), space.between(Recorded(), [2, 2, 2], [3, 4, 5]), rtol=1e-6)


@pytest.mark.parametrize("kind", ["absolute", "relative", "sum"])
def test_normalised_numbers_are_in_range(kind: str):
    space, draws = ActionSpace(**ARM, kind=kind), np.random.default_rng(1)
    scale, offset = (np.array(x) for x in space.normalization(farthest=4))
    recorded = Recorded()
    recorded.actions = np.where(draws.integers(0, 2, (200, 2)) == 1, ARM["high"], ARM["low"])  # the extremes
    origins = draws.integers(0, 190, 500)
    normalised = space.between(recorded, origins, origins + draws.integers(1, 5, 500)) * scale + offset
    np.testing.assert_allclose(np.abs(normalised).max(axis=0), 1)


def test_a_number_that_never_changes_is_not_divided_by_zero():
    for kind in ("absolute", "relative", "sum"):
        scale, offset = ActionSpace(["x"], [""], [0.0], [0.0], kind).normalization(2)
        assert np.isfinite([*scale, *offset]).all()


def test_sequences_follow_the_names(tmp_path: Path):
    space = ActionSpace(**ARM, kind="sum")
    np.testing.assert_allclose(
        read_actions("lift(0.25)*2, turn(-1e-1) + lift(1e+0)", space=space), [[0.25, 0], [0.25, 0], [1, -0.1]]
    )
    (tmp_path / "a.csv").write_text("turn,lift\n1,2\n3,4\n")
    np.testing.assert_allclose(read_actions(str(tmp_path / "a.csv"), space=space), [[2, 1], [4, 3]])
    np.save(tmp_path / "b.npy", np.ones((3, 2)))
    assert read_actions(str(tmp_path / "b.npy"), space=space).shape == (3, 2)


@pytest.mark.parametrize(
    "text", ["forward", "lift", "grip(1)", "lift(x)", "lift(1)*0", "lift(1e300)", "", "lift(1)turn(2)"]
)
def test_other_names_are_the_users_mistake(text: str):
    with pytest.raises(UserError, match="actions: "):
        read_actions(text, space=ActionSpace(**ARM, kind="sum"))


def test_absolute_numbers_are_all_given():
    with pytest.raises(UserError, match="lift\\(NUMBER\\)"):
        read_actions("lift(1)", space=ActionSpace(**ARM, kind="absolute"))


def test_a_file_with_other_names_is_the_users_mistake(tmp_path: Path):
    (tmp_path / "a.csv").write_text("turn,grip\n1,2\n")
    with pytest.raises(UserError, match="turn,grip"):
        read_actions(str(tmp_path / "a.csv"), space=ActionSpace(**ARM, kind="absolute"))


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"units": ["m"]}, "units"),
        ({"low": [0.0]}, "low"),
        ({"low": [1.0, 0.0]}, "low"),
        ({"high": [1.0, 1e300]}, "high"),
        ({"names": ["a", "a"]}, "names"),
        ({"kind": "motion"}, "low"),
        ({"kind": "other"}, "kind"),
    ],
)
def test_descriptions_are_checked(changed: dict, field: str):
    described = {"name": "arm", "actions": {**ARM, "kind": "absolute"}}
    assert DatasetInfo.parse(json.dumps(described), "dataset.json").actions.names == ["lift", "turn"]
    described["actions"] |= changed
    with pytest.raises(DataError, match=rf"dataset.json.*{field}"):
        DatasetInfo.parse(json.dumps(described), "dataset.json")


@pytest.mark.parametrize("space", [ActionSpace(), ActionSpace(**ARM, kind="sum"), ActionSpace(**ARM, kind="absolute")])
def test_no_goals_have_no_actions(space: ActionSpace):
    assert space.between(Recorded(), [], []).shape == (0, len(space.names))
