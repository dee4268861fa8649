import cmath
import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cdit.common.errors import DataError, UserError
from cdit.common.randomness import seed_of
from cdit.data.config import DataConfig
from cdit.data.layout import POSES
from cdit.data.motion import local_motion
from cdit.data.windows import WindowDataset, WindowKey

sys.path.append(str(Path(__file__).parent))
from walks import make_walks, same, windows

LENGTHS = {"a": 20, "b": 13}  # of the trajectories to train on


def config_of(folder, **values) -> DataConfig:
    return DataConfig(folder=str(folder), image_size=(12, 16), workers=0, **values)


def recorded(folder, name, time) -> float:
    """The grey of a recorded frame, which is of one grey all over and unlike any other."""
    return np.asarray(Image.open(folder / name / f"{time}.jpg")).mean()


def value_of(frame: torch.Tensor) -> int:
    assert frame.float().std() < 1
    return int(frame.float().mean().round())


def poses_of(folder, name):
    with open(folder / name / POSES, "rb") as file:
        return pickle.load(file)


def rotated(poses, now, then):
    """The motion by complex numbers: the displacement turned back by the heading."""
    displacement = complex(*(poses["position"][then] - poses["position"][now]))
    local = displacement * cmath.exp(-1j * poses["yaw"][now])
    turn = cmath.phase(cmath.exp(1j * (poses["yaw"][then] - poses["yaw"][now])))
    return local.real, local.imag, turn


def test_item_shapes_and_types(dataset):
    item = WindowDataset(config_of(dataset), "train")[0]
    assert {name: (tuple(value.shape), value.dtype) for name, value in item.named_tensors().items()} == {
        "context": ((4, 3, 12, 16), torch.uint8),
        "mask": ((4,), torch.bool),
        "target": ((4, 3, 12, 16), torch.uint8),
        "condition.action": ((4, 3), torch.float32),
        "condition.known": ((4,), torch.bool),
        "condition.time_shift": ((4,), torch.float32),
        "condition.spacing": ((), torch.float32),
        "key": ((), torch.int64),
        "weight": ((), torch.float32),
    }


@pytest.mark.parametrize(("low", "high", "min_history"), [(1, 8, 1), (-5, 5, 4), (-6, -2, 2), (3, 3, 3), (0, 4, 1)])
def test_windows_are_those_with_history_and_a_goal(dataset, low, high, min_history):
    config = config_of(dataset, min_offset=low, max_offset=high, min_history=min_history)
    windows = WindowDataset(config, "train")
    expected = [
        (i, now)
        for i, length in enumerate(LENGTHS.values())
        for now in range(length)
        if now + 1 >= min_history and any(0 <= now + k < length for k in range(low, high + 1))
    ]
    assert [windows.locate(index) for index in range(len(windows))] == expected
    for index in (-1, len(windows)):
        with pytest.raises(IndexError):
            windows.locate(index)


def test_frames_actions_and_times_of_every_window(dataset):
    windows = WindowDataset(config_of(dataset, min_offset=-8, max_offset=8, goals=3), "train", seed=5)
    for index in range(len(windows)):
        trajectory, now = windows.locate(index)
        name, length = list(LENGTHS.items())[trajectory]
        item = windows[WindowKey(index, 2, 7)]
        for slot, time in enumerate(range(now - 3, now + 1)):
            assert item.mask[slot] == (time >= 0)
            if time >= 0:
                assert abs(value_of(item.context[slot]) - recorded(dataset, name, time)) < 1
            else:
                assert item.context[slot].eq(0).all()
        for goal in range(3):
            offset = round(item.condition.time_shift[goal].item() * 5)
            assert item.condition.time_shift[goal] == pytest.approx(offset / 5)
            assert max(-8, -now) <= offset <= min(8, length - 1 - now)
            assert abs(value_of(item.target[goal]) - recorded(dataset, name, now + offset)) < 1
            expected = rotated(poses_of(dataset, name), now, now + offset)
            assert item.condition.action[goal].tolist() == pytest.approx(expected, abs=1e-5)
        assert item.condition.known.all()
        assert item.key == seed_of(5, 2, 7)


def test_every_offset_in_range_is_drawn_equally_often(dataset):
    windows = WindowDataset(config_of(dataset, min_offset=-2, max_offset=4, goals=8), "train")
    draws = [round(5 * k) for step in range(200) for k in windows[WindowKey(1, step, 0)].condition.time_shift.tolist()]
    counts = {offset: draws.count(offset) for offset in set(draws)}
    assert counts.keys() == {-1, 0, 1, 2, 3, 4}  # window 1 is frame 1: only one frame before it
    for count in counts.values():  # 1600 draws over 6 offsets, within 4.5 standard deviations
        assert abs(count - 1600 / 6) < 4.5 * math.sqrt(1600 * 5 / 36)


def test_yaw_wraps():
    origin, zero = np.zeros((5, 2)), np.zeros(5)
    turns = np.array([0.0, np.pi, -np.pi, 1.5 * np.pi, -7.0])
    expected = [0.0, -np.pi, -np.pi, -0.5 * np.pi, -7.0 + 2 * np.pi]
    assert local_motion(origin, zero, origin, turns)[:, 2] == pytest.approx(expected)


def test_forward_and_left():
    heading_north = np.pi / 2
    motion = local_motion(np.array([1.0, 1.0]), heading_north, np.array([1.0, 3.0]), heading_north)
    assert motion == pytest.approx([2.0, 0.0, 0.0])
    motion = local_motion(np.array([1.0, 1.0]), heading_north, np.array([0.0, 1.0]), heading_north + 0.5)
    assert motion == pytest.approx([0.0, 1.0, 0.5])


def test_the_key_alone_decides_the_draws(dataset):
    one, other = (WindowDataset(config_of(dataset), "train", seed=1) for _ in range(2))
    for _ in range(5):
        other[0]  # draws elsewhere change nothing
    for key in (WindowKey(3, 0, 0), WindowKey(3, 0, 1), WindowKey(3, 1, 0)):
        assert all(torch.equal(one[key][name], other[key][name]) for name in one[key])
    keys = [WindowKey(3, step, sample) for step in range(4) for sample in range(4)]
    assert len({tuple(one[key].condition.time_shift.tolist()) for key in keys}) > 8
    assert len({one[key].key.item() for key in keys}) == 16
    reseeded = WindowDataset(config_of(dataset), "train", seed=2)
    assert any(not torch.equal(one[key].condition.time_shift, reseeded[key].condition.time_shift) for key in keys)


def test_goals_are_keyed_by_seed_step_and_sample(dataset):
    windows = WindowDataset(config_of(dataset, goals=16), "train", seed=5)
    offsets = (windows[WindowKey(3, 2, 0)].condition.time_shift * 5).round().int().tolist()
    assert offsets != np.random.default_rng((5, 2)).integers(1, 8, size=16, endpoint=True).tolist()
    assert offsets == np.random.default_rng(seed_of(5, 2, 0)).integers(1, 8, size=16, endpoint=True).tolist()


def test_the_weight_is_that_of_the_key(dataset):
    windows = WindowDataset(config_of(dataset), "train")
    assert windows[3].weight == windows[WindowKey(3, 0, 3)].weight == 1
    filling = windows[WindowKey(3, 0, 3, 0.0)]
    assert filling.weight == 0
    assert same(replace(filling, weight=windows[3].weight), windows[3])


def test_window_with_given_offsets(dataset):
    windows = WindowDataset(config_of(dataset), "train")
    for index in windows.windows_with([-3, 6]):
        trajectory, now = windows.locate(index)
        item = windows.window(index, [-3, 6])
        assert item.condition.time_shift.tolist() == pytest.approx([-0.6, 1.2])
        expected = rotated(poses_of(dataset, "ab"[trajectory]), now, now - 3)
        assert item.condition.action[0].tolist() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(IndexError, match="frames 0 to 19"):
        windows.window(0, [-1])


@pytest.mark.parametrize("offsets", [[1], [8], [-5, 2], [-2], [0], [19]])
@pytest.mark.parametrize("min_history", [1, 4])
def test_windows_with_offsets_are_all_of_them(dataset, offsets, min_history):
    windows = WindowDataset(config_of(dataset, min_history=min_history), "train")
    expected = []
    for index in range(len(windows)):
        trajectory, now = windows.locate(index)
        length = len(windows.trajectories[trajectory])
        if now >= 3 and all(0 <= now + offset < length for offset in offsets):
            expected.append(index)
    assert windows.windows_with(offsets) == expected


def test_path_composes_to_the_direct_action(dataset):
    windows = WindowDataset(config_of(dataset), "train")
    path = windows.path(4, 6)
    assert torch.equal(path.context, windows.window(4, [1]).context)
    assert path.condition.time_shift.tolist() == pytest.approx([0.2] * 6)
    position, heading = 0j, 0.0
    for step, (dx, dy, dyaw) in enumerate(path.condition.action.tolist()):
        position += complex(dx, dy) * cmath.exp(1j * heading)
        heading += dyaw
        direct = windows.window(4, [step + 1])
        assert torch.equal(path.target[step], direct.target[0])
        assert [position.real, position.imag] == pytest.approx(direct.condition.action[0, :2].tolist(), abs=1e-4)
        assert cmath.exp(1j * heading) == pytest.approx(cmath.exp(1j * direct.condition.action[0, 2].item()), abs=1e-5)
    with pytest.raises(IndexError):
        windows.path(4, 16)


def test_frames_that_follow_are_those_of_the_path(dataset):
    """In every window, with the goals of before."""
    plain = WindowDataset(config_of(dataset, max_offset=2), "train")
    data = WindowDataset(config_of(dataset, max_offset=2, rollout=5), "train")
    assert len(data) == sum(length - 5 for length in LENGTHS.values())
    places = {plain.locate(i): i for i in range(len(plain))}
    for window in range(len(data)):
        item, path = data[WindowKey(window, 3, 1)], data.path(window, 5)
        assert torch.equal(item.following.frames, path.target)
        assert item.following.condition.named_tensors().keys() == path.condition.named_tensors().keys()
        for name, value in path.condition.named_tensors().items():
            assert torch.equal(item.following.condition.named_tensors()[name], value)
        alike = plain[WindowKey(places[data.locate(window)], 3, 1)].named_tensors()
        assert all(torch.equal(item.named_tensors()[name], value) for name, value in alike.items())


def test_video_without_poses(video_dataset):
    windows = WindowDataset(config_of(video_dataset), "train")
    item = windows[3]
    assert not windows.info.has_actions
    assert not item.condition.known.any()
    assert item.condition.action.eq(0).all()
    assert item.condition.time_shift.gt(0).all()


def test_a_dataset_from_elsewhere(dataset, tmp_path):
    """No dataset.json, yaw (T, 1), splits in another folder."""
    expected = rotated(poses_of(dataset, "a"), 2, 5)
    (dataset / "dataset.json").unlink()
    (dataset / "splits").rename(tmp_path / "lists")
    for name in "abc":
        poses = poses_of(dataset, name)
        poses["yaw"] = poses["yaw"][:, None]
        (dataset / name / POSES).write_bytes(pickle.dumps(poses, 2))
    config = config_of(dataset, splits=str(tmp_path / "lists"), spacing=0.25)
    windows = WindowDataset(config, "train")
    assert (windows.info.fps, windows.info.spacing, windows.info.has_actions) == (4.0, 0.25, True)
    assert windows.window(2, [3]).condition.action[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_config_overrides_the_description(dataset):
    info = WindowDataset(config_of(dataset), "train").info
    assert (info.fps, info.spacing) == (5.0, 0.5)
    info = WindowDataset(config_of(dataset, fps=10.0, spacing=2.0), "train").info
    assert (info.fps, info.spacing) == (10.0, 2.0)


@pytest.mark.parametrize(
    "values",
    [
        {"min_history": 5},
        {"min_history": 0},
        {"context_frames": 0},
        {"goals": 0},
        {"max_offset": 0},
        {"fps": 0.0},
        {"spacing": -1.0},
        {"cache_gb": -1.0},
    ],
    ids=str,
)
def test_values_out_of_range_are_named(dataset, values):
    field = next(iter(values))
    with pytest.raises(UserError, match=rf"data\.{field} is"):
        WindowDataset(config_of(dataset, **values), "train")


def test_problems_are_listed_and_cut_short(dataset):
    names = [f"none{i}" for i in range(30)]
    (dataset / "splits/train/traj_names.txt").write_text("\n".join(names))
    with pytest.raises(DataError, match=r"and 10 more: python -m cdit\.data\.check") as error:
        WindowDataset(config_of(dataset), "train")
    assert "none19" in str(error.value)
    assert "none20" not in str(error.value)


def test_data_does_not_import_the_model():
    code = (
        "import sys, cdit.data.loader, cdit.data.check, cdit.data.from_video, cdit.data.latents, "
        "cdit.data.shard_writer;"
        "print([m for m in sys.modules if m.startswith('cdit.') and m.split('.')[1] in "
        "('model', 'attention', 'diffusion', 'codec', 'world_model', 'training')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"


def test_a_frame_may_be_missing_where_samples_may_be_left_out(tmp_path):
    """The windows stay what they were, those without the frame read the same, those with it name the file."""
    folder = make_walks(tmp_path)
    whole = windows(folder)
    items = [whole[WindowKey(i, 0, i)] for i in range(len(whole))]
    last = max((folder / "walk_0").glob("*.jpg"), key=lambda file: int(file.stem))
    for frame in (folder / "walk_3" / "4.jpg", last):
        frame.unlink()
    lossy = windows(folder, on_error="skip", cache_gb=0)
    assert lossy.fingerprint() == whole.fingerprint()
    assert len(lossy) == len(whole)
    missing = set()
    for i, expected in enumerate(items):
        try:
            assert same(lossy[WindowKey(i, 0, i)], expected)
        except DataError as error:
            missing.add(next(name for name in (str(folder / "walk_3" / "4.jpg"), str(last)) if name in str(error)))
    assert len(missing) == 2


@pytest.mark.parametrize("split", ["train", "test"])
def test_missing_frames_are_refused_otherwise(tmp_path, split):
    folder = make_walks(tmp_path)
    (folder / {"train": "walk_3", "test": "walk_6"}[split] / "1.jpg").unlink()
    on_error = {"train": "stop", "test": "skip"}[split]
    with pytest.raises(DataError, match=r"1 of \d+ frames missing, the first is frame 1"):
        windows(folder, split, on_error=on_error)


def test_video_without_poses_cannot_say_how_many_frames_are_missing(tmp_path):
    folder = make_walks(tmp_path)
    for poses in folder.glob("*/traj_data.pkl"):
        poses.unlink()
    (folder / "dataset.json").unlink()
    (folder / "walk_3" / "1.jpg").unlink()
    with pytest.raises(DataError, match="1 of 14 frames missing"):
        windows(folder, on_error="skip")
