import json
import math
from pathlib import Path

import numpy as np
import pytest

from cdit.common.errors import UserError
from cdit.data.actions import parse_actions, read_actions
from cdit.data.motion import compose, local_motion


def test_words_are_signed_as_the_axes():
    actions = parse_actions("forward, back,left,right,turn_left,turn_right,stay", step=0.5)
    turn = math.radians(15)
    expected = [[0.5, 0, 0], [-0.5, 0, 0], [0, 0.5, 0], [0, -0.5, 0], [0, 0, turn], [0, 0, -turn], [0, 0, 0]]
    np.testing.assert_allclose(actions, expected, atol=1e-7)
    assert actions.dtype == np.float32


def test_sizes_repetitions_and_both_at_once():
    actions = parse_actions("forward(0.25)*2,forward + turn_left(30) * 3, turn_right(.5)", step=1.0)
    assert len(actions) == 6
    np.testing.assert_allclose(actions[1], [0.25, 0, 0])
    np.testing.assert_allclose(actions[2:5], [[1, 0, math.radians(30)]] * 3, rtol=1e-6)
    np.testing.assert_allclose(actions[5], [0, 0, -math.radians(0.5)], rtol=1e-6)


@pytest.mark.parametrize(
    "text",
    ["", "forwards*8", "forward*-1", "forward*0", "forward*x", "forward()", "turn_left(30", "stay(1)", "a,,b", "nan"],
)
def test_other_words_are_the_users_mistake(text: str):
    with pytest.raises(UserError, match="actions: "):
        read_actions(text)


ROWS = [[0.5, 0.0, 0.1], [0.25, -0.5, 0.0]]


def test_files(tmp_path: Path):
    (tmp_path / "a.csv").write_text("dx,dy,dyaw\n0.5,0,0.1\n0.25,-0.5,0\n\n")
    (tmp_path / "b.csv").write_text("0.5,0,0.1\n0.25,-0.5,0")
    (tmp_path / "c.json").write_text(json.dumps(ROWS))
    np.save(tmp_path / "d.npy", np.array(ROWS))
    for file in tmp_path.iterdir():
        np.testing.assert_allclose(read_actions(str(file)), ROWS, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"0,0,0\n1,2\n", "line 2"),
        ("a.csv", b"0.3,0,O\n0.2,0,0\n", "line 1"),
        ("a.csv", b"yaw,x,y\n0.5,0.1,0\n", "line 1 is 'yaw,x,y', expected dx,dy,dyaw"),
        ("a.csv", b"dx,dy,dyaw\n0,0,0\n1,2,x\n", "line 3"),
        ("a.csv", b"dx,dy,dyaw\n", "3 numbers"),
        ("a.csv", b"\xff\xfe\x00", "3 numbers"),
        ("a.csv", b"0,0,0\n0,inf,0\n", "row 1 .* not finite"),
        ("a.json", b"{", "3 numbers"),
        ("a.json", b"[[1, 2]]", "3 numbers"),
        ("a.json", b'{"a": 1}', "3 numbers"),
        ("a.json", b"[[1, 2, 3], [1]]", "3 numbers"),
        ("a.npy", b"no numpy file", "3 numbers"),
        ("a.npy", None, "No such file"),
    ],
)
def test_broken_files_are_the_users_mistake(tmp_path: Path, name: str, content: bytes | None, message: str):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        read_actions(str(tmp_path / name))
    assert name in str(raised.value)


def test_the_suffix_decides_not_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("forward").write_text("1,2,3\n")
    np.testing.assert_allclose(read_actions("forward", step=0.5), [[0.5, 0, 0]])
    with pytest.raises(UserError, match="No such file"):
        read_actions("back.csv")


def test_a_pickle_is_not_loaded(tmp_path: Path):
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"a\.npy"):
        read_actions(str(tmp_path / "a.npy"))


def test_composed_steps_are_the_motion_from_the_start():
    random = np.random.default_rng(0)
    position, yaw = random.normal(size=(9, 2)), random.uniform(-9, 9, size=9)
    steps = local_motion(position[:-1], yaw[:-1], position[1:], yaw[1:])
    whole = local_motion(position[:1], yaw[:1], position[1:], yaw[1:])
    np.testing.assert_allclose(compose(steps), whole, atol=1e-5)
