"""Motions in the plane, as tensors: composing steps into paths, and changing the frame that they are in.

A step is dx forward and dy left in metres and dyaw in radians, counter-clockwise, in the local frame at its start; a
path is the poses after each step, in the frame at the start. Suffixes: H frames.
"""

import torch
from torch import Tensor


def wrap(angle: Tensor) -> Tensor:
    """Angles in radians, wrapped to [-π, π)."""
    return (angle + torch.pi) % (2 * torch.pi) - torch.pi


def integrate(actions: Tensor) -> Tensor:
    """Steps (…, H, 3) to the path that they lead along, (…, H, 3), with yaw in [-π, π)."""
    yaw = actions[..., 2].cumsum(-1)
    before = yaw - actions[..., 2]
    dx, dy = actions[..., 0], actions[..., 1]
    x = (before.cos() * dx - before.sin() * dy).cumsum(-1)
    y = (before.sin() * dx + before.cos() * dy).cumsum(-1)
    return torch.stack((x, y, wrap(yaw)), dim=-1)


def between(first: Tensor, second: Tensor) -> Tensor:
    """The motion from poses (…, 3) to others, (…, 3), in the local frame of the first."""
    dx, dy = (second - first)[..., :2].unbind(-1)
    cos, sin = first[..., 2].cos(), first[..., 2].sin()
    return torch.stack((cos * dx + sin * dy, cos * dy - sin * dx, wrap(second[..., 2] - first[..., 2])), dim=-1)


def placed(path: Tensor, start: Tensor) -> Tensor:
    """A path (…, H, 3) in the frame of a start, in the coordinates of that start's pose (…, 3)."""
    x, y, yaw = path.unbind(-1)
    x0, y0, yaw0 = (part[..., None] for part in start.unbind(-1))
    cos, sin = yaw0.cos(), yaw0.sin()
    return torch.stack((x0 + cos * x - sin * y, y0 + sin * x + cos * y, wrap(yaw0 + yaw)), dim=-1)
