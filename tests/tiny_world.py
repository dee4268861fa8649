"""A dataset whose frames say which they are, and a tiny world model."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cdit.codec import Codec, PixelCodec
from cdit.data.config import DataConfig
from cdit.data.layout import DatasetInfo, write_split, write_trajectory
from cdit.data.windows import WindowDataset
from cdit.diffusion import SamplerConfig
from cdit.model import CDiT
from cdit.world_model import WorldDescription, WorldModel

FPS, SPACING, SIDE = 4.0, 0.25, 32
LENGTHS = {"a": 30, "b": 26, "c": 23}


@pytest.fixture(scope="session")
def walks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three walks; red says which, green the time, and the left half is darker, so that no metric sees flat pictures.

    Headings turn all the way round.
    """
    folder = tmp_path_factory.mktemp("data") / "walks"
    random = np.random.default_rng(3)
    for number, (name, length) in enumerate(LENGTHS.items()):
        frames = np.zeros((length, SIDE, SIDE, 3), np.uint8)
        frames[..., 0] = 60 * number + 60
        frames[..., 1] = 8 * np.arange(length)[:, None, None]
        frames[..., 2] = np.where(np.arange(SIDE) < SIDE // 2, 40, 200)
        yaw = random.normal(0.4, 0.3, length).cumsum()
        position = random.normal(scale=SPACING, size=(length, 2)).cumsum(axis=0)
        write_trajectory(folder, name, frames, position, yaw)
    write_split(folder, "test", list(LENGTHS))
    DatasetInfo("walks", fps=FPS, metric_waypoint_spacing=SPACING).save(folder)
    return folder


@pytest.fixture
def dataset(walks: Path) -> WindowDataset:
    """The windows of the walks, three frames of context."""
    return WindowDataset(DataConfig(str(walks), image_size=(SIDE, SIDE), context_frames=3, workers=0), "test")


def make_world(codec: Codec | None = None, patch_size: int = 8) -> WorldModel:
    torch.manual_seed(0)
    codec = codec or PixelCodec()
    size = SIDE // codec.downscale
    cdit = CDiT(
        image_size=(size, size),  # diffusers takes a positional argument for a default, which from_config leaves out
        max_context=3,
        in_channels=codec.channels,
        patch_size=patch_size,
        hidden_size=16,
        depth=1,
        num_heads=2,
    )
    for parameter in cdit.parameters():
        nn.init.normal_(parameter, std=0.1)
    return WorldModel(cdit, codec, WorldDescription((SIDE, SIDE), FPS, sampler=SamplerConfig(steps=2))).eval()


@pytest.fixture
def world() -> Callable[..., WorldModel]:
    """Makes a tiny world model with random weights, in pixels or in the latents of a codec."""
    return make_world


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny world model on disk."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    make_world().save_pretrained(folder / "best")
    return folder
