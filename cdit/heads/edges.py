"""Do heads look at edges? Attention on the patches of each past frame whose picture changes most.

An edge patch is one of the quarter of its frame's patches with the largest mean gradient of luma. Shapes and weights as
in `measures`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cdit.heads.measures import Layout, frame_maps

EDGE_SHARE = 0.25
"""Share of a frame's patches that are edge patches."""

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def gradient_magnitude(frames: Tensor, layout: Layout) -> Tensor:
    """Mean over each patch of the length of luma's gradient: (…, 3, H, W) to (…, N), per pixel.

    Sobel's operator, divided by 8 so that a ramp has its slope; the border is repeated outwards.

    Args:
        frames: in [-1, 1]; H and W are multiples of the grid's rows and columns.
        layout: gives the grid.
    """
    luma = (frames.float() * frames.new_tensor(LUMA, dtype=torch.float32)[:, None, None]).sum(-3)
    padded = F.pad(luma.reshape(-1, *luma.shape[-2:]), (1, 1, 1, 1), mode="replicate")
    # Differences come first, so that a patch of one colour has exactly 0.
    across, down = padded[..., 2:] - padded[..., :-2], padded[..., 2:, :] - padded[..., :-2, :]
    across = (across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]) / 8
    down = (down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]) / 8
    length = F.adaptive_avg_pool2d(torch.hypot(across, down), (layout.rows, layout.columns))
    return length.reshape(*luma.shape[:-2], layout.patches)


def edge_patches(magnitude: Tensor) -> Tensor:
    """How much each patch counts as an edge patch of its frame: (…, N) to (…, N) in [0, 1], summing to N / 4.

    1 for the patches of the largest magnitude, 0 for the others. Where the line between them runs through patches of
    equal magnitude, or N is no multiple of 4, these share evenly in what is left: a frame of one colour has 1/4
    everywhere.
    """
    larger = (magnitude[..., None, :] > magnitude[..., :, None]).sum(-1)
    equal = (magnitude[..., None, :] == magnitude[..., :, None]).sum(-1)
    return ((EDGE_SHARE * magnitude.shape[-1] - larger) / equal).clamp(0, 1)


def edge_share(weights: Tensor, edges: Tensor, layout: Layout) -> Tensor:
    """Share of the mass on the past frames that lies on their edge patches: (…, N) in [0, 1]; NaN where they get none.

    Args:
        weights: (…, N, M[+1]).
        edges: (…, T, N) from `edge_patches`, (…) broadcastable to that of the weights.
        layout: of the past frames; for self-attention, of the target.
    """
    maps = frame_maps(weights, layout).flatten(-2)
    return (maps * edges[..., None, :, :].to(maps)).sum((-2, -1)) / maps.sum((-2, -1))


def edge_lift(weights: Tensor, edges: Tensor, layout: Layout, chance: Tensor | None = None) -> Tensor:
    """`edge_share` over the share that chance gives: (…, N), 1 by chance, at most 4 against an even spread.

    Args:
        weights: (…, N, M[+1]).
        edges: (…, T, N), see `edge_share`.
        layout: see `edge_share`.
        chance: (…, T, N), how much each place counts as an edge in other pictures, such as the mean of `edge_patches`
            over a probe set: a head that always looks at places where edges tend to be is then not taken for one that
            looks at edges. By default 1/4 everywhere.
    """
    if chance is None:
        chance = torch.full_like(edges, EDGE_SHARE)
    return edge_share(weights, edges, layout) / edge_share(weights, chance, layout)
