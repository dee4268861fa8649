"""Reprojection of a past frame to the pose of the target: inverse warping (Zhou et al. 2017, arXiv 1704.07813).

Shape suffixes: B targets, C channels, H and W rows and columns.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

NEAR = 0.1
"""Points whose depth in the past camera is less than this fraction of their depth in the target count as not
visible."""


def reproject(
    frame_BCHW: Tensor,
    inverse_depth_BHW: Tensor,
    motion_B3: Tensor,
    focal: tuple[float, float],
    resampling: Literal["bilinear", "bicubic"] = "bicubic",
) -> tuple[Tensor, Tensor]:
    """The target frame as far as a past frame shows it, for a pinhole camera that moves in the ground plane.

    The point that a target's pixel shows is carried to the past camera, and the past frame is sampled where it projects
    to.

    Args:
        frame_BCHW: past frames.
        inverse_depth_BHW: of each pixel of the target, along the optical axis, in the inverse of the motion's unit.
        motion_B3: dx (forward), dy (left) and dyaw (counter-clockwise, radians) from the past camera to the target's.
        focal: focal lengths in half widths and in half heights of a frame; (1, 1) sees 90 degrees both ways.
        resampling: how the past frame is interpolated.

    Returns:
        The reprojected frame (B, C, H, W), and (B, 1, H, W), True where the past frame shows the point.
    """
    height, width = frame_BCHW.shape[-2:]
    rows = (torch.arange(height, device=frame_BCHW.device) * 2 + 1) / height - 1
    columns = (torch.arange(width, device=frame_BCHW.device) * 2 + 1) / width - 1
    left_W, up_H1 = -columns / focal[0], -rows[:, None] / focal[1]  # of the points at depth 1
    dx, dy, dyaw = motion_B3[:, None, None].unbind(-1)
    # Times inverse depth, so that points at infinity, which only a turn moves, are finite.
    forward_BHW = dyaw.cos() - dyaw.sin() * left_W + inverse_depth_BHW * dx
    left_BHW = dyaw.sin() + dyaw.cos() * left_W + inverse_depth_BHW * dy
    near_BHW = forward_BHW.clamp(min=NEAR)
    place_BHW2 = torch.stack((-focal[0] * left_BHW / near_BHW, -focal[1] * up_H1 / near_BHW), dim=-1)
    seen_BHW = (forward_BHW > NEAR) & (place_BHW2.abs() < 1).all(-1)
    # Clamped: a kernel converts coordinates to integers, and far ones would overflow.
    warped_BCHW = F.grid_sample(frame_BCHW, place_BHW2.clamp(-2, 2), resampling, "border", align_corners=False)
    return warped_BCHW, seen_BHW[:, None]
