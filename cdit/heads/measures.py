"""Measures of attention weights, as pure functions.

Weights are (…, N, M) or, with an extra key at the end, (…, N, M + 1): N = rows · columns target patches, M = T · N
tokens of T past frames, oldest first, each frame row by row. A row sums to 1, or is all zeros if nothing was visible.
Self-attention is the case of one frame, the target itself. Offsets are (rows down, columns right) in patches.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EDGE_SHARE = 0.25
"""Share of a frame's patches that count as edge patches: those with the largest mean gradient of luma."""
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Layout(NamedTuple):
    """Arrangement of the tokens that are attended to: frames of rows × columns patches."""

    frames: int
    rows: int
    columns: int

    @property
    def patches(self) -> int:
        """Patches per frame."""
        return self.rows * self.columns

    def positions(self, device: torch.device | None = None) -> Tensor:
        """(row, column) of each patch of a frame, (N, 2) int64."""
        rows, columns = torch.arange(self.rows, device=device), torch.arange(self.columns, device=device)
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)


def frame_maps(weights: Tensor, layout: Layout) -> Tensor:
    """The weights on the past frames as maps: (…, M[+1]) to (…, T, rows, columns)."""
    return weights[..., : layout.frames * layout.patches].unflatten(-1, layout)


# ---- how spread out, and on which frame ----


def entropy(weights: Tensor) -> Tensor:
    """-Σ w·ln w of each row, extra key included: (…, N) in nats, from 0 (one token) to ln of the number of tokens."""
    return torch.special.entr(weights).sum(-1)


def score_range(scores: Tensor) -> Tensor:
    """Largest minus smallest score of each row, extra key included: (…, N, M[+1]) to (…, N) in nats.

    Scores are q·kᵀ / √K, the input of the softmax; masked ones (-inf) are ignored. This is the logarithm of the largest
    weight over the smallest, even where the smallest underflows. NaN if nothing is visible.
    """
    visible = scores.isfinite()
    low = scores.masked_fill(~visible, torch.inf).amin(-1)
    return torch.where(visible.any(-1), scores.amax(-1) - low, torch.nan)


def frame_mass(weights: Tensor, layout: Layout) -> Tensor:
    """Share of the attention on each past frame: (…, N, T) in [0, 1]; with the extra key's share it sums to 1."""
    return frame_maps(weights, layout).sum((-2, -1))


def extra_share(weights: Tensor, layout: Layout) -> Tensor:
    """Share of the attention on the extra key: (…, N) in [0, 1]; zeros if there is none."""
    return weights[..., layout.frames * layout.patches :].sum(-1)


# ---- where within a frame ----


def mean_distance(weights: Tensor, layout: Layout) -> Tensor:
    """Expected distance between a target patch and the places it attends to: (…, N) in patches.

    Euclidean on the grid, from 0 (same place) to the grid's diagonal. The expectation is over the tokens of past
    frames, renormalised without the extra key; NaN if they get no weight.
    """
    position = layout.positions(weights.device).to(weights.dtype)
    spatial = _over_frames(weights, layout)
    return (spatial * torch.cdist(position, position)).sum(-1) / spatial.sum(-1)


def same_place_share(weights: Tensor, layout: Layout) -> Tensor:
    """Share of the mass on past frames that is on the target patch's own place: (…, N) in [0, 1]; NaN without mass."""
    spatial = _over_frames(weights, layout)
    return spatial.diagonal(dim1=-2, dim2=-1) / spatial.sum(-1)


def offset_mass(weights: Tensor, layout: Layout) -> Tensor:
    """Attention by offset from the target patch, averaged over target patches.

    (…, 2·rows - 1, 2·columns - 1) in [0, 1]; offset (0, 0) is in the middle. Sums to the mass on the past frames.
    """
    position = layout.positions(weights.device)
    offset = position[None] - position[:, None] + position.new_tensor([layout.rows - 1, layout.columns - 1])
    index = (offset[..., 0] * (2 * layout.columns - 1) + offset[..., 1]).flatten()
    pairs = _over_frames(weights, layout).flatten(-2)
    shape = (2 * layout.rows - 1, 2 * layout.columns - 1)
    mass = pairs.new_zeros(*pairs.shape[:-1], shape[0] * shape[1]).index_add(-1, index, pairs)
    return mass.unflatten(-1, shape) / layout.patches


def largest_offset(mass: Tensor, layout: Layout) -> Tensor:
    """The offset with the largest `offset_mass`: (…, 2) int64."""
    index = mass.flatten(-2).argmax(-1)
    columns = mass.shape[-1]
    return torch.stack((index // columns - (layout.rows - 1), index % columns - (layout.columns - 1)), dim=-1)


def _over_frames(weights: Tensor, layout: Layout) -> Tensor:
    """(…, N, M[+1]) to (…, N, N): the weights on each place, summed over frames."""
    return frame_maps(weights, layout).sum(-3).flatten(-2)


# ---- edges ----


def gradient_magnitude(frames: Tensor, layout: Layout) -> Tensor:
    """Mean over each patch of the norm of luma's gradient: (…, 3, H, W) to (…, N), per pixel.

    Sobel operator, divided by 8 so that a ramp yields its slope; the border is replicated. Frames are in [-1, 1]; H and
    W are multiples of the grid's rows and columns.
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

    1 for the patches of the largest magnitude, 0 for the others. Patches tied at the boundary share the remainder
    evenly, so that a frame of one colour has 1/4 everywhere.
    """
    larger = (magnitude[..., None, :] > magnitude[..., :, None]).sum(-1)
    equal = (magnitude[..., None, :] == magnitude[..., :, None]).sum(-1)
    return ((EDGE_SHARE * magnitude.shape[-1] - larger) / equal).clamp(0, 1)


def edge_lift(weights: Tensor, edges: Tensor, layout: Layout, chance: Tensor) -> Tensor:
    """Attention on the edge patches of past frames relative to chance: (…, N), 1 at chance level.

    Args:
        weights: (…, N, M[+1]).
        edges: (…, T, N) from `edge_patches`, (…) broadcastable to that of the weights.
        layout: of the past frames; for self-attention, of the target.
        chance: (T, N), how much each place counts as an edge on average, such as the mean of `edges` over samples.
            A head with a fixed preference for places where edges are common then has lift 1.
    """
    maps = frame_maps(weights, layout).flatten(-2)
    on_edges, by_chance = ((maps * x[..., None, :, :].to(maps)).sum((-2, -1)) for x in (edges, chance))
    mass = maps.sum((-2, -1))
    return (on_edges / mass) / (by_chance / mass)


# ---- what is moved, and how alike heads are ----


def value_norms(values: Tensor, output_maps: Tensor) -> Tensor:
    """‖W_O^h · V_j‖ of each token and head: (…, H, M[+1]), in units of the residual stream before the gate.

    Args:
        values: (…, H, M[+1], K).
        output_maps: W_O^h, (H, D, K): the columns of W_O that multiply a head's output.
    """
    # One head at a time: all tokens of all heads at full width would be the largest tensor of a report.
    heads = zip(values.float().unbind(-3), output_maps.float(), strict=True)
    return torch.stack([(value @ output_map.T).norm(dim=-1) for value, output_map in heads], dim=-2)


def value_weighted(weights: Tensor, norms: Tensor) -> Tensor:
    """Weights · norms, each row rescaled to sum to 1: where the information that is moved comes from.

    Kobayashi et al. 2020, "Attention is Not Only a Weight" (arXiv 2004.10102): head h adds Σ_j w_j · W_O^h · V_j, so a
    token with a large weight and a small value moves nothing. Every measure of weights applies to the result. Rows that
    move nothing are zeros.

    Args:
        weights: (…, N, M[+1]).
        norms: (…, M[+1]), see `value_norms`.
    """
    moved = weights * norms[..., None, :]
    total = moved.sum(-1, keepdim=True)
    return torch.where(total > 0, moved / total, 0.0)


def head_distances(weights: Tensor) -> Tensor:
    """Jensen–Shannon distance between the rows of two heads, averaged over target patches.

    √(H(½p + ½q) - ½H(p) - ½H(q)) with the entropy H in bits (Lin 1991; Endres and Schindelin 2003): a metric, 0 for
    equal rows, 1 for rows without a common token; the extra key counts as a token.

    Args:
        weights: (…, H, N, M[+1]), rows summing to 1.

    Returns:
        (…, H, H) symmetric, zeros on the diagonal.
    """
    entropies = entropy(weights)
    heads = weights.shape[-3]
    distances = weights.new_zeros(*weights.shape[:-3], heads, heads)
    for first in range(heads - 1):  # one head against those after it: all pairs at once would be H times the weights
        mixed = (weights[..., first, None, :, :] + weights[..., first + 1 :, :, :]) / 2
        nats = entropy(mixed) - (entropies[..., first, None, :] + entropies[..., first + 1 :, :]) / 2
        distance = (nats / torch.log(nats.new_tensor(2.0))).clamp(0, 1).sqrt().mean(-1)
        distances[..., first, first + 1 :] = distances[..., first + 1 :, first] = distance
    return distances


# ---- does attention move with the camera? ----
#
# A turn shifts the picture: if the camera turns left by dyaw, what a patch shows was f·tan(dyaw) columns further left
# in the past frame, f being the focal length in patches (exact at the picture's centre). Walking forward expands the
# picture from its centre: what a patch at p shows was at p·(1 - dx / Z) from the centre, Z being its distance before
# the step. So a head that follows content has a field of offsets that is a translation by -f per radian under turning
# and a divergence of -1/Z per metre under walking; a head that attends to fixed places has fields that do not depend
# on the motion.


class OffsetFields(NamedTuple):
    """Expected offset from each target patch to the tokens it attends to, in each past frame."""

    offset: Tensor
    """(…, T, N, 2); zeros where the frame gets no weight."""
    mass: Tensor
    """(…, T, N) attention on the frame."""


class Motion(NamedTuple):
    """A translation and an expansion from the grid's centre: offset(p) = translation + divergence · (p - centre)."""

    translation: Tensor
    """(…, 2)."""
    divergence: Tensor
    """(…), unitless; -1 if all patches attend to one place, as heads that spread evenly do."""


def offset_fields(weights: Tensor, layout: Layout) -> OffsetFields:
    """The offset field of each past frame separately, because each has its own motion to the target."""
    maps = frame_maps(weights, layout).flatten(-2).transpose(-2, -3)  # (…, T, N, N)
    position = layout.positions(weights.device).to(weights.dtype)
    mass = maps.sum(-1)
    seen = maps @ position / torch.where(mass > 0, mass, 1.0)[..., None]
    return OffsetFields(torch.where(mass[..., None] > 0, seen - position, 0.0), mass)


def fit_motion(fields: OffsetFields, layout: Layout) -> Motion:
    """The translation and divergence closest to each field by least squares, patches weighted by mass: (…, T).

    NaN where a frame gets no weight; if all its mass comes from one patch, the divergence is NaN too.
    """
    position = layout.positions(fields.mass.device).to(fields.mass.dtype)
    position = position - position.mean(0)
    share = (fields.mass / fields.mass.sum(-1, keepdim=True))[..., None]
    mean_position, mean_offset = (share * position).sum(-2), (share * fields.offset).sum(-2)
    away = position - mean_position[..., None, :]
    divergence = (share * away * fields.offset).sum((-2, -1)) / (share * away.square()).sum((-2, -1))
    return Motion(mean_offset - divergence[..., None] * mean_position, divergence)
