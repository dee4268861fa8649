from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cdit.data.layout import DatasetInfo, write_split, write_trajectory

LENGTHS = {"train": {"a": 20, "b": 13}, "test": {"c": 12}}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two trajectories to train on and one to test on, 24×32 frames of one grey each, poses of a random walk."""
    return make_dataset(tmp_path / "dataset")


@pytest.fixture
def video_dataset(tmp_path: Path) -> Path:
    """The same without poses."""
    return make_dataset(tmp_path / "video", poses=False)


def make_dataset(folder: Path, poses: bool = True) -> Path:
    random = np.random.default_rng(3)
    for split, lengths in LENGTHS.items():
        for name, length in lengths.items():
            values = (10 + 6 * np.arange(length) + 2 * "abc".index(name)).astype(np.uint8)
            frames = np.broadcast_to(values[:, None, None, None], (length, 24, 32, 3))
            walk = random.normal(size=(length, 3)).cumsum(axis=0)
            pose = (walk[:, :2], walk[:, 2] * 2) if poses else ()
            write_trajectory(folder, name, frames, *pose)
        write_split(folder, split, list(lengths))
    DatasetInfo("synthetic", fps=5.0, metric_waypoint_spacing=0.5 if poses else None, has_actions=poses).save(folder)
    return folder


@pytest.fixture
def count_decodes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, int]]:
    """How often each file was decoded in this process so far."""
    from cdit.data import frames

    counts: dict[str, int] = {}
    decode = frames.decode

    def counting(path: Path):
        counts[str(path)] = counts.get(str(path), 0) + 1
        return decode(path)

    monkeypatch.setattr(frames, "decode", counting)
    return lambda: counts
