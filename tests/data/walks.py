"""A dataset of noise in several trajectories, and shards of it."""

from pathlib import Path

import numpy as np
import torch

from cdit.batch import Batch
from cdit.data.config import DataConfig
from cdit.data.layout import DatasetInfo, write_split, write_trajectory
from cdit.data.shard_writer import convert
from cdit.data.sources import Source
from cdit.data.windows import WindowDataset

SHARD_MB = 0.021  # one trajectory of them, or two short ones


def make_walks(folder: Path, count: int = 7) -> Path:
    """Trajectories of different lengths, every frame noise of its own."""
    random = np.random.default_rng(1)
    for i in range(count):
        length = 5 + 3 * (i % 4)
        frames = random.integers(0, 256, (length, 12, 16, 3), np.uint8)
        pose = random.normal(size=(length, 3)).cumsum(axis=0)
        write_trajectory(folder, f"walk_{i}", frames, pose[:, :2], pose[:, 2])
    write_split(folder, "train", [f"walk_{i}" for i in range(count - 1)])
    write_split(folder, "test", [f"walk_{count - 1}"])
    DatasetInfo("walks", fps=5.0, metric_waypoint_spacing=0.5).save(folder)
    return folder


def converted(folder: Path, out: Path, **values) -> Path:
    convert(Source(str(folder)), out, **{"splits": None, "shard_mb": SHARD_MB, **values})
    return out


def config_of(folder, **values) -> DataConfig:
    return DataConfig(folder=str(folder), **{"image_size": (12, 16), "workers": 0, "max_offset": 4, **values})


def windows(folder, split: str = "train", **values) -> WindowDataset:
    return WindowDataset(config_of(folder, **values), split, seed=3)


def same(one: Batch, other: Batch) -> bool:
    found, expected = one.named_tensors(), other.named_tensors()
    equal = found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    return equal and one.skipped == other.skipped
