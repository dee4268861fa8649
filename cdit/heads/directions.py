"""Does where a head looks move with the camera?

A turn shifts the picture: where the camera turns left by dyaw, what a patch at column c shows stood f·tan(dyaw) columns
further left in the past frame, f being the focal length in patches (exact at the picture's centre). Walking forward
expands the picture from its centre: what a patch at p shows stood at p·(1 - dx / Z) from the centre, Z being its
distance before the step. So a head that follows what it sees has an offset field that is a translation by -f per
radian under turning and a divergence of -1/Z per metre under walking; a head that always looks at the same place has
fields that no motion changes.

Shapes and weights as in `measures`. Offsets are (rows down, columns right) in patches.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cdit.common.statistics import Estimate, estimates
from cdit.heads.measures import Layout, frame_maps


class OffsetFields(NamedTuple):
    """Where each target patch looks in each past frame, from where it is itself."""

    offset: Tensor
    """(…, T, N, 2) expected offset; zeros where the frame gets nothing."""
    mass: Tensor
    """(…, T, N) attention on the frame."""


class Motion(NamedTuple):
    """A translation and an expansion from the grid's centre: offset(p) = translation + divergence · (p - centre)."""

    translation: Tensor
    """(…, 2) in patches, rows down and columns right."""
    divergence: Tensor
    """(…), without unit; -1 where all patches look at one place, such as heads that spread evenly."""


@dataclass(frozen=True)
class Trend:
    """How a value of a head changes with one of several factors, the others held."""

    slope: Estimate
    """Value per unit of the factor; 0 where the factor does not vary by itself."""
    correlation: float
    """Partial correlation in [-1, 1]; 0 where value or factor does not vary by itself."""


def offset_fields(weights: Tensor, layout: Layout) -> OffsetFields:
    """The expected offset from each target patch to what it looks at, for each past frame by itself.

    For each frame, because each has a motion of its own to the target.
    """
    maps = frame_maps(weights, layout).flatten(-2).transpose(-2, -3)  # (…, T, N, N)
    position = layout.positions(weights.device).to(weights.dtype)
    mass = maps.sum(-1)
    seen = maps @ position / torch.where(mass > 0, mass, 1.0)[..., None]
    return OffsetFields(torch.where(mass[..., None] > 0, seen - position, 0.0), mass)


def fit_motion(fields: OffsetFields, layout: Layout) -> Motion:
    """The translation and divergence nearest to each field by least squares, patches weighed by their mass: (…, T).

    NaN where a frame gets nothing; where all its mass comes from one place, the divergence is NaN too.
    """
    position = layout.positions(fields.mass.device).to(fields.mass.dtype)
    position = position - position.mean(0)
    share = (fields.mass / fields.mass.sum(-1, keepdim=True))[..., None]
    mean_position, mean_offset = (share * position).sum(-2), (share * fields.offset).sum(-2)
    away = position - mean_position[..., None, :]
    divergence = (share * away * fields.offset).sum((-2, -1)) / (share * away.square()).sum((-2, -1))
    return Motion(mean_offset - divergence[..., None] * mean_position, divergence)


def trends(values: np.ndarray, factors: np.ndarray, trajectories: Sequence[Hashable], seed: int = 0) -> list[Trend]:
    """Least squares of a value on an intercept and factors, such as the motion (dx, dy, dyaw).

    Intervals are bootstrapped over trajectories, to first order: the slope is the mean of the samples' influence values
    slope + n·zᵢ·eᵢ / Σz², z being what the other factors leave of the factor and e the residuals, and it is these that
    are resampled (Davison and Hinkley 1997, section 2.7). Samples whose value is not finite are left out.

    Args:
        values: (n,).
        factors: (n, F).
        trajectories: n names.
        seed: of the resamples.

    Returns:
        F trends.
    """
    finite = np.isfinite(values)
    y, x = values[finite].astype(np.float64), factors[finite].astype(np.float64)
    names = [name for name, kept in zip(trajectories, finite, strict=True) if kept]
    if not names:
        return [Trend(Estimate(0.0, None, None), 0.0)] * factors.shape[1]
    y, x = y - y.mean(), x - x.mean(axis=0)
    residual = _residual(y, x)
    found = []
    for i in range(x.shape[1]):
        others = np.delete(x, i, axis=1)
        z, left = _residual(x[:, i], others), _residual(y, others)
        if not _varies(z, factors[:, i]):
            found.append(Trend(Estimate(0.0, None, None), 0.0))
            continue
        slope = float(z @ left / (z @ z))
        influence = slope + len(z) * z * residual / (z @ z)
        correlation = float(z @ left / np.sqrt((z @ z) * (left @ left))) if _varies(left, values[finite]) else 0.0
        found.append(Trend(estimates(influence, names, seed)[0], correlation))
    return found


def _residual(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """What least squares on the columns of x leave of y."""
    return y - x @ np.linalg.lstsq(x, y, rcond=None)[0]


def _varies(residual: np.ndarray, whole: np.ndarray) -> bool:
    """Whether what is left is more than rounding."""
    return bool(np.abs(residual).max() > 1e-6 * max(np.abs(whole).max(), 1e-6))
