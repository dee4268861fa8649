"""Axial rotary positions (RoFormer, Su et al. 2021; axial form as in Heo et al. 2024, arXiv 2403.13298).

A token has the position (frame, row, column). The channel pairs of a head are divided among the three axes; each pair
is rotated by the coordinate of its axis times a frequency. The product q·k then depends on coordinate differences
alone, so keys that were rotated once stay valid while the window slides: later queries have larger coordinates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Frequencies run from 1 to 1/THETA radians a patch: wavelengths of 6 to 63 patches, similar to the grids here. With the
# 10000 that is common for texts of thousands of tokens, most channels would hardly rotate.
THETA = 10.0


class Rotation(NamedTuple):
    """Cosine and sine of each token's angles, each (…, N, K / 2)."""

    cos: Tensor
    sin: Tensor


def axial_rotation(position_N3: Tensor, head_width: int) -> Rotation:
    """Angles of tokens at (frame, row, column), (…, N, 3), for heads of an even width: a fourth of the pairs, and at
    least one of three or more, follows the frame; the rest is halved between row and column.
    """
    pairs = head_width // 2
    frame_pairs = max(pairs // 4, int(pairs > 2))
    row_pairs = (pairs - frame_pairs) // 2
    shares = (frame_pairs, row_pairs, pairs - frame_pairs - row_pairs)
    angles = [
        position_N3[..., axis, None] * THETA ** -torch.linspace(0, 1, share, device=position_N3.device)
        for axis, share in enumerate(shares)
    ]
    angle_NK = torch.cat(angles, dim=-1)
    return Rotation(angle_NK.cos(), angle_NK.sin())


def corner(rotation: Rotation | None) -> Rotation | None:
    """The rotation of the first token, (1, K / 2)."""
    return rotation and Rotation(*(angle[:1] for angle in rotation))


def rotate(x_BHNK: Tensor, rotation: Rotation | None) -> Tensor:
    """Rotates channel pair (i, i + K/2) of every token by its i-th angle; None leaves x unchanged."""
    if rotation is None:
        return x_BHNK
    cos, sin = rotation.cos.to(x_BHNK.dtype), rotation.sin.to(x_BHNK.dtype)
    a, b = x_BHNK.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
