"""What attention weights say, as pure functions of them.

Weights are (…, N, M) or, with an extra key at the end, (…, N, M + 1): N = rows · columns target patches, M = T · N
tokens of T past frames, oldest first, each frame row by row. A row sums to 1, or is all zeros where nothing could be
seen. Self-attention is the case of one frame, the target itself.

Further measures by theme: `value_weighted` (what is moved), `edges`, `directions`, `redundancy`, `correspondence`.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """How the tokens that are looked at lie: frames of rows × columns patches."""

    frames: int
    rows: int
    columns: int

    @property
    def patches(self) -> int:
        """Patches of a frame."""
        return self.rows * self.columns

    def positions(self, device: torch.device | None = None) -> Tensor:
        """(row, column) of each patch of a frame, (N, 2) int64."""
        rows, columns = torch.arange(self.rows, device=device), torch.arange(self.columns, device=device)
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)


def frame_maps(weights: Tensor, layout: Layout) -> Tensor:
    """The weights on the past frames as maps: (…, M[+1]) to (…, T, rows, columns)."""
    return weights[..., : layout.frames * layout.patches].unflatten(-1, layout)


def entropy(weights: Tensor) -> Tensor:
    """-Σ w·ln w of each row, extra key included: (…, N) in nats, from 0 (one token) to ln of the number of tokens."""
    return torch.special.entr(weights).sum(-1)


def effective_tokens(weights: Tensor) -> Tensor:
    """exp(entropy): as many tokens, looked at evenly, would have this entropy; (…, N), from 1 to their number."""
    return entropy(weights).exp()


def score_range(scores: Tensor) -> Tensor:
    """Largest less smallest score of each row, extra key included: (…, N, M[+1]) to (…, N) in nats.

    Scores are q·kᵀ / √K, what the softmax is taken of; -inf where masked, which does not count. It is the logarithm of
    the largest weight over the smallest, also where the smallest would be too small for a float. NaN where nothing
    could be seen.
    """
    visible = scores.isfinite()
    low = scores.masked_fill(~visible, torch.inf).amin(-1)
    return torch.where(visible.any(-1), scores.amax(-1) - low, torch.nan)


def frame_mass(weights: Tensor, layout: Layout) -> Tensor:
    """Share of the attention on each past frame: (…, N, T) in [0, 1]; with the extra key's share it sums to 1."""
    return frame_maps(weights, layout).sum((-2, -1))


def extra_share(weights: Tensor, layout: Layout) -> Tensor:
    """Share of the attention on the extra key: (…, N) in [0, 1]; zeros where there is none."""
    return weights[..., layout.frames * layout.patches :].sum(-1)


def mean_distance(weights: Tensor, layout: Layout) -> Tensor:
    """Expected distance between a target patch and the place in a past frame that it looks at: (…, N) in patches.

    Euclidean on the grid, from 0 (same place) to the grid's diagonal. The expectation is over the past frames'
    tokens, renormalised without the extra key; NaN where they get nothing.
    """
    position = layout.positions(weights.device).to(weights.dtype)
    spatial = _over_frames(weights, layout)
    return (spatial * torch.cdist(position, position)).sum(-1) / spatial.sum(-1)


def offset_mass(weights: Tensor, layout: Layout) -> Tensor:
    """Attention by offset from the target patch to what it looks at, averaged over target patches.

    (…, 2·rows - 1, 2·columns - 1) in [0, 1]; offset (0, 0) is in the middle. Sums to the mass on the past frames.
    """
    position = layout.positions(weights.device)
    offset = position[None] - position[:, None] + position.new_tensor([layout.rows - 1, layout.columns - 1])
    index = (offset[..., 0] * (2 * layout.columns - 1) + offset[..., 1]).flatten()
    pairs = _over_frames(weights, layout).flatten(-2)
    shape = (2 * layout.rows - 1, 2 * layout.columns - 1)
    mass = pairs.new_zeros(*pairs.shape[:-1], shape[0] * shape[1]).index_add(-1, index, pairs)
    return mass.unflatten(-1, shape) / layout.patches


def preferred_offset(weights: Tensor, layout: Layout) -> Tensor:
    """The offset (rows down, columns right) with the largest `offset_mass`: (…, 2) int64 in patches."""
    return largest_offset(offset_mass(weights, layout), layout)


def largest_offset(mass: Tensor, layout: Layout) -> Tensor:
    """The offset (rows down, columns right) that has most of an `offset_mass`: (…, 2) int64 in patches."""
    index = mass.flatten(-2).argmax(-1)
    columns = mass.shape[-1]
    return torch.stack((index // columns - (layout.rows - 1), index % columns - (layout.columns - 1)), dim=-1)


def same_place_share(weights: Tensor, layout: Layout) -> Tensor:
    """Share of the mass on the past frames that lies on the target patch's own place in them: (…, N) in [0, 1].

    NaN where the past frames get nothing.
    """
    spatial = _over_frames(weights, layout)
    return spatial.diagonal(dim1=-2, dim2=-1) / spatial.sum(-1)


def _over_frames(weights: Tensor, layout: Layout) -> Tensor:
    """(…, N, M[+1]) to (…, N, N): the weights on each place, whichever the frame."""
    return frame_maps(weights, layout).sum(-3).flatten(-2)
