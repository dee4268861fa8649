"""How far a turning camera moved the picture, measured from two frames."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def horizontal_shift(first: Tensor, second: Tensor) -> Tensor:
    """How far the picture moved to the right from the first frame to the second, in pixels, to a fraction of one: (N,).

    The shift, of at most half the width, at which the overlapping parts correlate best, each with its mean subtracted
    and its energy normalised; between whole pixels a parabola through the best and its neighbours. Phase correlation,
    the usual choice, fails more often here: it assumes periodic borders and weights all frequencies equally, which
    suits neither large shifts nor blurred predictions.

    Args:
        first: (N, C, H, W), any range; the channels are averaged.
        second: as `first`.
    """
    a, b = first.float().mean(1), second.float().mean(1)
    width = a.shape[-1]
    limit = width // 2
    scores = []
    for shift in range(-limit, limit + 1):
        x = a[..., max(0, -shift) : width - max(0, shift)]
        y = b[..., max(0, shift) : width - max(0, -shift)]
        x, y = x - x.mean((1, 2), keepdim=True), y - y.mean((1, 2), keepdim=True)
        energy = (x.square().sum((1, 2)) * y.square().sum((1, 2))).sqrt()
        scores.append((x * y).sum((1, 2)) / energy.clamp(min=1e-6))
    score = torch.stack(scores, dim=1)  # (N, 2·limit + 1)
    best = score.argmax(1, keepdim=True)
    left, top, right = (score.gather(1, (best + step).clamp(0, 2 * limit)) for step in (-1, 0, 1))
    curvature = (left - 2 * top + right).clamp(max=-1e-6)
    return (best - limit + ((left - right) / 2 / curvature).clamp(-0.5, 0.5))[:, 0]


def measured_turn(first: Tensor, second: Tensor, focal: tuple[float, float]) -> Tensor:
    """The turn of a camera between two frames in radians, counter-clockwise: (N,).

    Turning left moves the picture to the right; at its centre by f·tan(turn), towards the edges by more. On a cylinder
    around the camera all columns move alike, so that is where the shift is measured.

    Args:
        first: (N, 3, H, W) in [-1, 1].
        second: as `first`.
        focal: horizontal and vertical focal length in pixels.
    """
    width = first.shape[-1]
    radians_per_column = 2 * math.atan(width / 2 / focal[0]) / width
    return horizontal_shift(onto_cylinder(first, focal), onto_cylinder(second, focal)) * radians_per_column


def onto_cylinder(frames: Tensor, focal: tuple[float, float]) -> Tensor:
    """Frames (N, C, H, W) with columns at equal angles, the full field of view across; of the same shape.

    The rows are those heights on the cylinder that the frame shows at every angle.
    """
    height, width = frames.shape[-2:]
    half = math.atan(width / 2 / focal[0])
    angle = ((torch.arange(width, device=frames.device) + 0.5) / width * 2 - 1) * half
    rise = ((torch.arange(height, device=frames.device) + 0.5) / height * 2 - 1) * math.cos(half)
    x = focal[0] * angle.tan() / (width / 2)
    y = rise[:, None] / angle.cos()
    grid = torch.stack((x.expand_as(y), y), dim=-1)
    return F.grid_sample(frames.float(), grid.expand(len(frames), -1, -1, -1), align_corners=False)
