"""Several datasets in one: every window once, each with its own spacing, poses and frames."""

import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cdit.common.errors import DataError, UserError
from cdit.data import safe_pickle
from cdit.data.config import DataConfig
from cdit.data.layout import Camera, DatasetInfo
from cdit.data.shard_writer import convert
from cdit.data.sources import Source
from cdit.data.windows import WindowDataset, WindowKey

sys.path.append(str(Path(__file__).parent))
from walks import same


def windows_of(*sources: Source, **values) -> WindowDataset:
    return WindowDataset(DataConfig(mix=list(sources), image_size=(12, 16), workers=0, **values), "train")


def alone(source: Source, **values) -> WindowDataset:
    config = DataConfig(source.folder, fps=source.fps, spacing=source.spacing, image_size=(12, 16), workers=0, **values)
    return WindowDataset(config, "train")


def test_the_windows_of_a_mix_are_those_of_its_parts_in_order(dataset, video_dataset):
    sources = [Source(str(dataset), spacing=0.25), Source(str(video_dataset))]
    mix, parts = windows_of(*sources), [alone(source) for source in sources]
    assert len(mix) == sum(map(len, parts))
    expected = [part[WindowKey(index, 3, 9)] for part in parts for index in range(len(part))]
    found = [mix[WindowKey(index, 3, 9)] for index in range(len(mix))]
    for one, other in zip(expected, found, strict=True):
        assert same(one, other)


def test_labelled_and_unlabelled_windows_side_by_side(dataset, video_dataset):
    mix = windows_of(Source(str(dataset)), Source(str(video_dataset)))
    first, last = mix[0], mix[len(mix) - 1]
    assert first.condition.known.all()
    assert first.condition.action.abs().sum() > 0
    assert not last.condition.known.any()
    assert (last.condition.action == 0).all()
    assert last.condition.time_shift.abs().sum() > 0
    assert mix.info.has_actions
    assert mix.info.spacing == 0.5  # that of the only dataset with poses


def test_each_window_tells_the_spacing_of_its_dataset(dataset, tmp_path):
    mix = windows_of(Source(str(dataset), spacing=0.25), Source(str(dataset), spacing=0.75))
    assert mix.info.spacing is None
    assert mix[0].condition.spacing.item() == 0.25
    assert mix[len(mix) - 1].condition.spacing.item() == 0.75
    assert windows_of(Source(str(dataset)), Source(str(dataset))).info.spacing == 0.5


def test_datasets_of_other_rates_do_not_mix(dataset):
    with pytest.raises(DataError, match=r"same frame rate, not .* 5, .* 4"):
        windows_of(Source(str(dataset)), Source(str(dataset / ".." / "dataset"), fps=4))


def test_a_broken_part_is_named(dataset, tmp_path):
    with pytest.raises(DataError, match=r"none: split 'train' cannot be used"):
        windows_of(Source(str(dataset)), Source(str(tmp_path / "none")))


def test_a_camera_is_known_where_all_have_the_same(dataset, video_dataset):
    camera = Camera(32, 24, horizontal_fov=1.2, eye_height=1.0)
    replace(DatasetInfo.load(dataset), camera=camera).save(dataset)
    assert windows_of(Source(str(dataset)), Source(str(dataset))).info.camera == camera
    assert windows_of(Source(str(dataset)), Source(str(video_dataset))).info.camera is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"either data\.folder.* or data\.mix"),
        ({"folder": "a", "mix": [Source("b")]}, r"either data\.folder.* or data\.mix"),
        ({"mix": [Source("b")], "spacing": 0.3}, r"data\.spacing belongs to data\.folder"),
        ({"folder": "a", "min_future": -1}, r"data\.min_future is -1"),
    ],
)
def test_what_does_not_go_together_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**values).validate()


def test_windows_end_where_enough_frames_follow(dataset):
    windows = alone(Source(str(dataset)), min_offset=-4, max_offset=4, min_history=4, min_future=6)
    times = [windows.locate(index) for index in range(len(windows))]
    assert times == [(0, now) for now in range(3, 20 - 6)] + [(1, now) for now in range(3, 13 - 6)]


USERS = """
import numpy as np
import torch
from cdit.common.errors import DataError
from cdit.data.layout import DatasetInfo
from cdit.data.source import DatasetSource, TrajectorySource

class Walk(TrajectorySource):
    def __init__(self, name, length):
        self.name, self.length = name, length
        self.position, self.yaw = np.arange(2.0 * length).reshape(length, 2), np.zeros(length)
        self.conditions = {"hour": np.arange(length) / 2, "place": np.full((length, 3), length)}

    def __len__(self):
        return self.length

    def frames(self, times):
        if 9 in times:
            raise DataError(f"{self.name}: frame 9 is broken")
        return torch.tensor(times, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 24, 32)

class Synthetic(DatasetSource):
    @staticmethod
    def open(folder, split, **options):
        return [Walk(f"{folder}_{i}", 12 + i) for i in range(2)], DatasetInfo(folder, fps=2.0)
"""


def test_a_source_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "my_data.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    config = DataConfig("made_up", source="my_data:Synthetic", image_size=(12, 16), workers=0, max_offset=3)
    windows = WindowDataset(config, "train")
    assert [(t.name, len(t)) for t in windows.trajectories] == [("made_up_0", 12), ("made_up_1", 13)]
    assert windows.info.fps == 2.0
    window = windows.window(4, [1, 3])
    assert window.context[:, 0, 0, 0].tolist() == [1, 2, 3, 4]
    assert window.target[:, 0, 0, 0].tolist() == [5, 7]
    assert window.condition.known.all()
    assert window.condition.extra["hour"].tolist() == [2.5, 3.5]
    assert window.condition.extra["hour"].dtype == torch.float32
    assert window.condition.extra["place"].tolist() == [[12] * 3] * 2
    with pytest.raises(DataError, match="frame 9 is broken"):
        windows.window(8, [1])
    assert sorted(windows.order(0).tolist()) == list(range(len(windows)))


@pytest.mark.parametrize("source", ["tape", "no_such_module:Tapes", "cdit.data.layout:DatasetInfo"])
def test_sources_that_are_not_there(dataset, source):
    with pytest.raises(UserError, match=rf"data\.source (is '{source}'|names the module no_such)"):
        WindowDataset(DataConfig(str(dataset), source=source), "train")


def test_conditions_are_those_of_the_poses_file_in_folders_and_shards(dataset, tmp_path):
    hours = {}
    for name in ("a", "b", "c"):
        path = dataset / name / "traj_data.pkl"
        poses = safe_pickle.load(path)
        hours[name] = np.linspace(0, 24, len(poses["yaw"]))
        only_a = {"lamp": np.ones(len(poses["yaw"]), bool)} if name == "a" else {}
        path.write_bytes(pickle.dumps({**poses, **only_a, "hour": hours[name], "action": hours[name], "names": ["x"]}))
    convert(Source(str(dataset)), tmp_path / "shards", None)
    for folder in (dataset, tmp_path / "shards"):
        windows = WindowDataset(DataConfig(str(folder), image_size=(12, 16), workers=0), "train")
        for index in (0, len(windows) - 1):
            trajectory, now = windows.locate(index)
            extra = windows.window(index, [1]).condition.extra
            assert extra.keys() == {"hour"}  # not of one trajectory alone, nor under a name of our own
            assert extra["hour"].item() == pytest.approx(hours["ab"[trajectory]][now + 1])
