"""Single frames of a dataset, to measure and train codecs on."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from cdit.common.randomness import generator
from cdit.data.config import DataConfig
from cdit.data.frames import FrameStore
from cdit.data.sources import open_source


class RecordedFrames(Dataset):
    """All frames (3, H, W) uint8 of a split, cropped and resized as for a world model.

    Raises:
        DataError: the dataset cannot be read.
    """

    def __init__(self, config: DataConfig, split: str):
        trajectories = [found for source in config.sources for found in open_source(source, split)[0]]
        self.store = FrameStore(trajectories, config.image_size, config.crop, config.cache_gb)

    def __len__(self) -> int:
        return int(self.store.starts[-1])

    def __getitem__(self, index: int) -> Tensor:
        trajectory = int(np.searchsorted(self.store.starts, index, side="right")) - 1
        return self.store.read(trajectory, [index - int(self.store.starts[trajectory])])[0]

    def spread(self, count: int) -> Tensor:
        """At most `count` frames (N, 3, H, W), evenly spread over all."""
        return torch.stack([self[i] for i in np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)])


class StepSampler(Sampler):
    """The frames of each step from `start` on, drawn with replacement by (seed, step), so that a resumed run continues
    with the same ones.
    """

    def __init__(self, frames: int, batch_size: int, seed: int, start: int, stop: int):
        self.frames, self.batch_size, self.seed, self.steps = frames, batch_size, seed, range(start, stop)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            draws = generator(self.seed, 0, step)
            yield torch.randint(self.frames, (self.batch_size,), generator=draws).tolist()
