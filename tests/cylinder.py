"""A camera that turns in the middle of a textured cylinder: what it sees is known for every yaw."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cdit.common.frames import to_uint8
from cdit.data.layout import Camera, DatasetInfo, write_split, write_trajectory

SIZE, FPS = (40, 40), 4.0
CAMERA = Camera(width=40, height=40, horizontal_fov=1.2, eye_height=1.0)


def view(yaw: Tensor) -> Tensor:
    """(N, 3, H, W) for yaws (N,), counter-clockwise."""
    random = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 3, 12, 80, generator=random) * 2 - 1
    panorama = F.interpolate(coarse, (96, 640), mode="bicubic").clamp(-1, 1).expand(len(yaw), -1, -1, -1)
    x = (torch.arange(40) + 0.5 - 20) / CAMERA.focal_length
    angle = (x.atan() - yaw[:, None] + np.pi) % (2 * np.pi) - np.pi
    height = (x[:, None] * x.atan().cos()).expand(len(yaw), -1, -1)
    grid = torch.stack(((angle / np.pi)[:, None].expand(-1, 40, -1), height), dim=-1)
    return F.grid_sample(panorama, grid, align_corners=False, padding_mode="border")


def write_turning(folder: Path, yaw: Tensor) -> Path:
    """A dataset of one trajectory, test/a, of a camera on the spot with these yaws."""
    frames = to_uint8(view(yaw)).permute(0, 2, 3, 1).numpy()
    write_trajectory(folder, "a", frames, np.zeros((len(yaw), 2)), yaw.numpy(), quality=98)
    write_split(folder, "test", ["a"])
    DatasetInfo("turning", fps=FPS, metric_waypoint_spacing=0.3, camera=CAMERA).save(folder)
    return folder
