import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cdit.common.errors import DataError
from cdit.data.check import check, main
from cdit.data.config import DataConfig, Source
from cdit.data.layout import POSES
from cdit.data.trajectory import read_split
from cdit.data.windows import WindowDataset


def problems(folder: Path, splits: list[str] | None = None, decode: bool = True) -> list[str]:
    return check(Source(str(folder)), splits, decode).problems


def change_poses(trajectory: Path, **values: np.ndarray) -> None:
    with open(trajectory / POSES, "rb") as file:
        poses = pickle.load(file)
    (trajectory / POSES).write_bytes(pickle.dumps(poses | values))


def with_nan(shape: tuple[int, ...], value: float = np.nan) -> np.ndarray:
    array = np.zeros(shape)
    array[5] = value
    return array


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-60])


def resize(file: Path) -> None:
    Image.new("RGB", (16, 16)).save(file)


def keep_one_frame(trajectory: Path) -> None:
    for time in range(1, 20):
        (trajectory / f"{time}.jpg").unlink()
    change_poses(trajectory, position=np.zeros((1, 2)), yaw=np.zeros(1))


class Poison:
    def __reduce__(self):
        return os.system, ("true",)


# A change to the dataset, the expected message, and whether finding it needs decoding.
CASES = {
    "missing frame": (lambda d: (d / "a/7.jpg").unlink(), "a: 1 of 20 frames missing, the first is frame 7", False),
    "first frame missing": (lambda d: (d / "a/0.jpg").unlink(), "a: 1 of 20 frames missing", False),
    "last frame missing": (lambda d: (d / "a/19.jpg").unlink(), "a: 19 frames, but 20 poses", False),
    "frame twice": (lambda d: shutil.copy(d / "a/7.jpg", d / "a/7.png"), "a: frame 7 exists twice", False),
    "truncated frame": (lambda d: cut(d / "a/7.jpg"), "a/7.jpg: not a readable image", True),
    "empty frame": (lambda d: (d / "a/7.jpg").write_bytes(b""), "a/7.jpg: not a readable image", True),
    "frame of another size": (
        lambda d: resize(d / "a/7.jpg"),
        "a: frames of different sizes (frame 0 is 32×24, frame 7",
        True,
    ),
    "nan position": (lambda d: change_poses(d / "a", position=with_nan((20, 2))), "1 poses are not finite", False),
    "infinite yaw": (lambda d: change_poses(d / "a", yaw=with_nan((20,), np.inf)), "the first at frame 5", False),
    "fewer poses": (lambda d: change_poses(d / "a", position=np.zeros((9, 2)), yaw=np.zeros(9)), "but 9 poses", False),
    "yaw of another length": (lambda d: change_poses(d / "a", yaw=np.zeros(19)), "not (20, 2) and (19,)", False),
    "yaw of another shape": (lambda d: change_poses(d / "a", yaw=np.zeros((20, 2))), "not (20, 2) and (20, 2)", False),
    "position in space": (
        lambda d: change_poses(d / "a", position=np.zeros((20, 3))),
        "expected position (T, 2)",
        False,
    ),
    "poses of text": (lambda d: change_poses(d / "a", yaw=["east"] * 20), "not arrays of numbers", False),
    "poses without yaw": (lambda d: (d / "a" / POSES).write_bytes(pickle.dumps({"position": 1})), "and 'yaw'", False),
    "poses missing": (lambda d: (d / "a" / POSES).unlink(), f"a/{POSES}: not readable (No such file", False),
    "poses cut short": (lambda d: cut(d / "a" / POSES), f"a/{POSES}: not a readable pickle", False),
    "poisoned poses": (lambda d: (d / "a" / POSES).write_bytes(pickle.dumps(Poison())), ".system, expected", False),
    "too short": (lambda d: keep_one_frame(d / "a"), "a: 1 frames, too few for a window, which takes 2", False),
    "trajectory missing": (lambda d: shutil.rmtree(d / "a"), "a: listed in split 'train', but there is no such", False),
    "listed twice": (lambda d: (d / "splits/train/traj_names.txt").write_text("a\nb\na\n"), "lists a 2 times", False),
    "empty split": (lambda d: (d / "splits/train/traj_names.txt").write_text("\n \n"), "'train' is empty", False),
    "missing split": (lambda d: shutil.rmtree(d / "splits/train"), "split 'train' cannot be read", False),
    "split not text": (lambda d: (d / "splits/train/traj_names.txt").write_bytes(b"\xff"), "cannot be read", False),
    "not json": (lambda d: (d / "dataset.json").write_text("{"), "dataset.json: not JSON", False),
    "bad json": (lambda d: (d / "dataset.json").write_text('{"fps": "fast"}'), "dataset.json: not a dataset", False),
    "newer format": (lambda d: (d / "dataset.json").write_text('{"name": "x", "version": 9}'), "version 9", False),
    "no dataset": (shutil.rmtree, "no such dataset folder", False),
}


@pytest.mark.parametrize("case", CASES)
def test_every_malformed_case_is_found_up_front_and_in_training(dataset, case):
    spoil, expected, takes_decoding = CASES[case]
    assert problems(dataset) == []
    spoil(dataset)
    found = problems(dataset)
    assert len(found) == 1
    assert expected in found[0]
    assert str(dataset) in found[0]
    if takes_decoding:
        assert problems(dataset, decode=False) == []
        if "size" not in case:  # frames of other sizes are resized in training
            windows = WindowDataset(DataConfig(folder=str(dataset)), "train")
            with pytest.raises(DataError, match=r"7\.jpg"):
                [windows[index] for index in range(len(windows))]
    else:
        assert problems(dataset, decode=False) == found
        with pytest.raises(DataError) as error:
            WindowDataset(DataConfig(folder=str(dataset)), "train")
        assert found[0] in str(error.value)


def test_yaw_in_degrees_is_found(dataset):
    turns = np.cumsum(np.full(20, 35.0))
    change_poses(dataset / "a", yaw=turns)
    assert problems(dataset, decode=False) == [
        f"{dataset}/a: yaw changes by more than 2π between frames, expected radians"
    ]
    radians = np.radians(turns)
    for yaw in (radians, (radians + np.pi) % (2 * np.pi) - np.pi, -radians % (2 * np.pi)):
        change_poses(dataset / "a", yaw=yaw)
        assert problems(dataset, decode=False) == []


def test_all_problems_at_once(dataset):
    (dataset / "a" / "3.jpg").unlink()
    change_poses(dataset / "a", yaw=with_nan((20,)))
    cut(dataset / "b" / "4.jpg")
    cut(dataset / "b" / "9.jpg")
    (dataset / "splits/test/traj_names.txt").write_text("a\nc\nnone\n")
    found = problems(dataset)
    for expected in ("a: 1 of 20", "not finite", "b/4.jpg", "b/9.jpg", "more than one split (train, test)", "none"):
        assert any(expected in line for line in found)


def test_trajectories_too_short_for_a_window_are_left_out_and_counted(dataset, capsys):
    config = DataConfig(folder=str(dataset), min_history=4, min_offset=10, max_offset=12)
    windows = WindowDataset(config, "train")
    assert [trajectory.name for trajectory in windows.trajectories] == ["a"]
    assert len(windows) == 20 - 3 - 10
    assert "1 of 2 trajectories of split 'train' have fewer than 14 frames" in capsys.readouterr().err


def test_a_split_of_nothing_but_short_trajectories(dataset):
    config = DataConfig(folder=str(dataset), min_offset=20, max_offset=24)
    with pytest.raises(DataError, match=r"no trajectory of split 'train' .* takes 21 frames; the longest has 20"):
        WindowDataset(config, "train")


def test_what_a_killed_recording_left_is_ignored(dataset):
    before = [trajectory.name for trajectory in read_split(dataset, "train")[0]]
    shutil.copytree(dataset / "a", dataset / ".d.partial")
    cut(dataset / ".d.partial/3.jpg")
    (dataset / ".d.partial" / POSES).unlink()
    (dataset / "dataset.json.partial").write_text("{")
    assert problems(dataset) == []
    trajectories, found = read_split(dataset, "train")
    assert ([trajectory.name for trajectory in trajectories], found) == (before, [])


def test_splits_by_name(dataset):
    shutil.rmtree(dataset / "splits/test")
    assert problems(dataset, ["train"]) == []
    assert "split 'test'" in problems(dataset)[0]


def test_video_without_poses_is_fine(video_dataset):
    assert problems(video_dataset) == []


def test_the_command_line_says_what_is_there(dataset, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check", str(dataset)])
    main()
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "train: 2 trajectories, 33 frames; test: 1 trajectories, 12 frames" in out
    cut(dataset / "b" / "4.jpg")
    monkeypatch.setattr(sys, "argv", ["check", str(dataset), "--split", "train", "--fast"])
    main()
    assert "train: 2 trajectories, 33 frames)" in capsys.readouterr().out


def test_the_command_line_fails_with_all_problems(dataset):
    cut(dataset / "b" / "4.jpg")
    (dataset / "a" / "3.jpg").unlink()
    done = subprocess.run([sys.executable, "-m", "cdit.data.check", dataset], capture_output=True, text=True)
    assert done.returncode == 2
    assert "2 problems" in done.stderr
    assert "b/4.jpg" in done.stderr
    assert "Traceback" not in done.stderr
