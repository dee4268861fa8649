"""Errors of planned actions: of a path (see `cdit.common.motion`), or of other numbers."""

from typing import NamedTuple

import torch
from torch import Tensor

from cdit.common.motion import wrap
from cdit.data.action_space import ActionSpace

PATH_MEASURES = {"ATE": 2, "RPE": 2, "final distance [m]": 2, "final turn [°]": 1}
"""Errors of motion and their decimals."""
SHARES = {"all steps [% of range]": 1, "end [% of range]": 1}
"""Those of other actions, which those of each number follow."""
MOST_COLUMNS = 8
"""Largest number of an action's numbers whose errors are listed one by one."""


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


def measures_of(space: ActionSpace) -> dict[str, int]:
    """The errors of an action space and their decimals."""
    if space.kind == "motion":
        return PATH_MEASURES
    titles = [f"{name} [{unit}]" if unit else name for name, unit in zip(space.names, space.units, strict=True)]
    return SHARES | {title: 3 for title in titles[:MOST_COLUMNS]}


def action_errors(actions: Tensor, truth: Tensor, space: ActionSpace) -> Tensor:
    """Errors (…, M), M as in `measures_of`, of actions (…, H, K) from the start to the end of each step.

    The first two are absolute differences as shares of the recorded range of each number (for sums, of the range over
    H steps), averaged over the numbers: over all steps, and of the last one. Then follows that of each number at the
    end, in its unit.
    """
    difference = (actions - truth).abs()
    width = torch.tensor(space.high) - torch.tensor(space.low)
    share = 100 * difference / torch.where(width > 0, width, 1) / (truth.shape[-2] if space.kind == "sum" else 1)
    shares = torch.stack((share.mean((-2, -1)), share[..., -1, :].mean(-1)), dim=-1)
    return torch.cat((shares, difference[..., -1, :MOST_COLUMNS]), dim=-1)
