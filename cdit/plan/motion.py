"""Errors of a path (see `cdit.common.motion`)."""

from typing import NamedTuple

from torch import Tensor

from cdit.common.motion import wrap


class PathErrors(NamedTuple):
    """Errors of paths, each of shape (…)."""

    ate: Tensor
    """Absolute trajectory error: root mean square distance between poses of the same time, without alignment,
    in units of the spacing (Sturm et al. 2012; the NWM release)."""
    rpe: Tensor
    """Relative pose error: root mean square of the differences of single steps, in units of the spacing. As in the NWM
    release, which ignores orientation, steps are compared in the frame at the start."""
    metres: Tensor
    """Distance between the last poses."""
    degrees: Tensor
    """Angle between the last headings."""


def path_errors(path: Tensor, truth: Tensor, spacing: float) -> PathErrors:
    """Errors of paths (…, H, 3); the pose at the start, where both agree, does not count.

    Args:
        path: planned.
        truth: true.
        spacing: metres, the unit of ATE and RPE.
    """
    offset = (path - truth)[..., :2]
    relative = offset.diff(dim=-2)
    rpe = relative.square().sum(-1).mean(-1).sqrt() if relative.shape[-2] else offset.new_zeros(offset.shape[:-2])
    return PathErrors(
        ate=offset.square().sum(-1).mean(-1).sqrt() / spacing,
        rpe=rpe / spacing,
        metres=offset[..., -1, :].norm(dim=-1),
        degrees=wrap(path[..., -1, 2] - truth[..., -1, 2]).abs().rad2deg(),
    )
