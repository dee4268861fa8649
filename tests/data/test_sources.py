"""Several datasets in one: every window once, each with its own spacing, poses and frames."""

from dataclasses import replace

import pytest
from walks import same

from cdit.common.errors import DataError, UserError
from cdit.data.config import DataConfig
from cdit.data.layout import Camera, DatasetInfo
from cdit.data.sources import Source
from cdit.data.windows import WindowDataset, WindowKey


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
    with pytest.raises(DataError, match=r"same number of frames a second, not .* 5, .* 4"):
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
        ({"mix": [Source("b")], "spacing": 0.3}, r"data\.spacing goes with data\.folder"),
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
