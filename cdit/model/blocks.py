"""The blocks of CDiT.

Shape suffixes: B batch (one target each), N target tokens, M context tokens, D width; S contexts, each shared by
B / S consecutive targets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from cdit.model.attention import KeysValues, MultiHeadAttention, Part, fold_queries
from cdit.model.rotary import Rotation, axial_rotation, corner

REACH = 4.0
"""Number of patches by which an output of 1 of `Steering` moves where a head attends."""


@dataclass
class Modulation:
    """How AdaLN-Zero conditions one branch; each (B, 1, D), or (B, N, D) in a `WideBlock`."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class ContextTokens(NamedTuple):
    """Context tokens from which a block computes its keys and values."""

    tokens_SMD: Tensor
    mask: Tensor | None
    """(S, 1, 1, M), and one for the extra key, True where a token exists; None if all do."""
    rotation: Rotation | None


def modulate(x_BND: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x·(1 + scale) + shift."""
    return torch.addcmul(shift, x_BND, 1 + scale)


def layer_norm(width: int) -> nn.LayerNorm:
    """LayerNorm without parameters, because AdaLN or the next projection makes them redundant."""
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


def feed_forward(width: int, ratio: float) -> Mlp:
    """The MLP branch, with tanh-approximated GELU."""
    return Mlp(width, int(width * ratio), act_layer=partial(nn.GELU, approximate="tanh"))


class Steering(nn.Module):
    """Shifts and scales the coordinates at which each head attends, depending on the condition.

    (row, column) becomes centre + ((row, column) − centre)·2^tanh(z) + 4·o, with o and z in R² of each head from a
    linear map of the condition. A turn of the camera shifts the picture, a step forward scales it: queries start
    from where things were. Keys do not change.

    Args:
        width: D.
        heads: h.
        grid: rows and columns of patches.
    """

    def __init__(self, width: int, heads: int, grid: tuple[int, int]):
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.centre = tuple((side - 1) / 2 for side in grid)
        self.linear = nn.Linear(width, 4 * heads)

    def forward(self, condition_BD: Tensor, position_N3: Tensor) -> Rotation:
        """Rotation of the queries, (B, H, N, K / 2), of tokens at (frame, row, column)."""
        moves_BD = self.linear(condition_BD)
        moves_BD = moves_BD.to(torch.promote_types(moves_BD.dtype, torch.float32))
        offset_BH12, zoom_BH12 = moves_BD.unflatten(-1, (self.heads, 1, 4)).chunk(2, dim=-1)
        frame_N1, place_N2 = position_N3.split((1, 2), dim=-1)
        centre = position_N3.new_tensor(self.centre)
        place_BHN2 = centre + (place_N2 - centre) * zoom_BH12.tanh().exp2() + REACH * offset_BH12
        position_BHN3 = torch.cat((frame_N1.expand(*place_BHN2.shape[:-1], 1), place_BHN2), dim=-1)
        return axial_rotation(position_BHN3, self.head_width)


class Block(nn.Module):
    """Self-attention, cross-attention and MLP, each a residual branch that AdaLN-Zero shifts, scales and gates.

    Args:
        width: D.
        heads: heads of both attentions.
        mlp_ratio: hidden width of the MLP over D.
        qk_norm: see `MultiHeadAttention`; for both attentions.
        extra_kv: see `MultiHeadAttention`; for cross-attention.
        context_modulation: the context is shifted and scaled by the condition before K and V are computed.
        norm: pre: x + gate·branch(mod(norm(x))); post: x + gate·norm(branch(mod(x))), the residual post-norm of
            Swin V2 (Liu et al. 2022), with which a block with closed gates is still the identity.
        dropout: share of each branch's output zeroed in training.
        steering_grid: rows and columns of patches, if the condition moves where the queries of cross-attention attend
            (see `Steering`); None otherwise.
        key_norm: keys are computed from normalised context tokens, values from unnormalised ones.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        extra_kv: bool = False,
        context_modulation: bool = False,
        norm: Literal["pre", "post"] = "pre",
        dropout: float = 0.0,
        steering_grid: tuple[int, int] | None = None,
        key_norm: bool = False,
    ):
        super().__init__()
        self.pre_norm = norm == "pre"
        self.chunks = 11 if context_modulation else 9
        self.norm = layer_norm(width)
        self.self_attn = MultiHeadAttention(width, heads, qk_norm)
        self.cross_attn = MultiHeadAttention(width, heads, qk_norm, extra_kv)
        self.mlp = feed_forward(width, mlp_ratio)
        self.dropout = nn.Dropout(dropout)
        self.ada_ln = nn.Linear(width, self.chunks * width)
        self.steering = None if steering_grid is None else Steering(width, heads, steering_grid)
        self.key_norm = layer_norm(width) if key_norm else None

    def forward(
        self,
        x_BND: Tensor,
        condition_BD: Tensor,
        context: Sequence[Part] | ContextTokens,
        rotation: Rotation | None = None,
        position_N3: Tensor | None = None,
    ) -> Tensor:
        """One step of the residual stream, (B, N, D).

        Args:
            x_BND: target tokens.
            condition_BD: the input of AdaLN.
            context: this block's keys and values of the past frames, in parts that each have their own S, the last the
                largest; or the tokens to compute them from, with `context_modulation` and S = B.
            rotation: of the target's tokens.
            position_N3: (frame, row, column) of the target's tokens, for `Steering`.
        """
        chunks = self.ada_ln(condition_BD)[:, None].chunk(self.chunks, dim=-1)
        for_self, for_cross, for_mlp = (Modulation(*chunks[i : i + 3]) for i in (0, 3, 6))
        parts = context
        if isinstance(context, ContextTokens):
            tokens_SMD = modulate(context.tokens_SMD, *chunks[9:]) if chunks[9:] else context.tokens_SMD
            # Not by `project_kv`, after which sharded weights would be released.
            kv = self.cross_attn.project_kv(tokens_SMD, context.rotation, self.key_norm, corner(rotation))
            parts = [Part(kv, context.mask)]

        def self_attention(x: Tensor) -> Tensor:
            return self.self_attn(x, rotation=rotation)

        def cross_attention(x: Tensor) -> Tensor:
            # Targets that share a context become further queries to it, so that its keys are not copied.
            folded = x.reshape(parts[-1].rows, -1, x.shape[-1])
            repeats = folded.shape[1] // x.shape[1]
            if self.steering is None:
                folded_rotation = rotation and Rotation(*(angle.repeat(repeats, 1) for angle in rotation))
            else:
                steered = self.steering(condition_BD, position_N3)
                folded_rotation = Rotation(*(fold_queries(angle, len(folded)) for angle in steered))
            q_BHNK = self.cross_attn.project_q(folded, folded_rotation)
            return self.cross_attn.attend(q_BHNK, parts).view_as(x)

        x_BND = self._residual(x_BND, for_self, self_attention)
        x_BND = self._residual(x_BND, for_cross, cross_attention)
        return self._residual(x_BND, for_mlp, self.mlp)

    def project_kv(
        self, tokens_SMD: Tensor, rotation: Rotation | None = None, extra_rotation: Rotation | None = None
    ) -> KeysValues:
        """Keys and values for `forward` from context tokens (modulated ones, with `context_modulation`).

        `extra_rotation` is that of the position of the extra key: the first token of the target.
        """
        return self.cross_attn.project_kv(tokens_SMD, rotation, self.key_norm, extra_rotation)

    def _residual(self, x_BND: Tensor, m: Modulation, branch: Callable[[Tensor], Tensor]) -> Tensor:
        if self.pre_norm:
            y_BND = branch(modulate(self.norm(x_BND), m.shift, m.scale))
        else:
            y_BND = self.norm(branch(modulate(x_BND, m.shift, m.scale)))
        return torch.addcmul(x_BND, m.gate, self.dropout(y_BND))


class ContextBlock(nn.Module):
    """An encoder block over a past frame: self-attention, then an MLP, pre-norm. Independent of the target."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, qk_norm: bool = False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = MultiHeadAttention(width, heads, qk_norm)
        self.mlp = feed_forward(width, mlp_ratio)

    def forward(self, x_BND: Tensor, rotation: Rotation | None = None) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        x_BND = x_BND + self.attn(self.norm1(x_BND), rotation=rotation)
        return x_BND + self.mlp(self.norm2(x_BND))


class WideBlock(nn.Module):
    """Self-attention and MLP, each a residual branch that AdaLN-Zero shifts, scales and gates per token, pre-norm."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, qk_norm: bool = False):
        super().__init__()
        self.norm = layer_norm(width)
        self.attn = MultiHeadAttention(width, heads, qk_norm)
        self.mlp = feed_forward(width, mlp_ratio)
        self.ada_ln = nn.Linear(width, 6 * width)

    def forward(self, x_BND: Tensor, condition_BND: Tensor, rotation: Rotation | None = None) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        chunks = self.ada_ln(condition_BND).chunk(6, dim=-1)
        for_attn, for_mlp = Modulation(*chunks[:3]), Modulation(*chunks[3:])
        y_BND = self.attn(modulate(self.norm(x_BND), for_attn.shift, for_attn.scale), rotation=rotation)
        x_BND = torch.addcmul(x_BND, for_attn.gate, y_BND)
        y_BND = self.mlp(modulate(self.norm(x_BND), for_mlp.shift, for_mlp.scale))
        return torch.addcmul(x_BND, for_mlp.gate, y_BND)


class FinalLayer(nn.Module):
    """LayerNorm, shifted and scaled by the condition, and a linear map to the values of a patch."""

    def __init__(self, width: int, values: int):
        super().__init__()
        self.norm = layer_norm(width)
        self.ada_ln = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, values)

    def forward(self, x_BND: Tensor, condition: Tensor) -> Tensor:
        """(B, N, D) to (B, N, values); the condition is (B, 1, D), or (B, N, D) for one of each token."""
        shift, scale = self.ada_ln(condition).chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x_BND), shift, scale))


class OutputConvolutions(nn.Module):
    """Three 3×3 convolutions over the output features of each pixel, concatenated with the noisy frame.

    A linear map predicts every patch separately, so neighbours may disagree at their border; convolutions see both
    sides.

    Args:
        features: F, per pixel or latent cell.
        in_channels: C of the noisy frame.
        out_channels: of the prediction.
    """

    def __init__(self, features: int, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(features + in_channels, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)
        self.conv3 = nn.Conv2d(features, out_channels, 3, padding=1)

    def forward(self, features_BFHW: Tensor, noisy_BCHW: Tensor) -> Tensor:
        """(B, F, H, W) and (B, C, H, W) to (B, out_channels, H, W)."""
        # Convolutions are faster with channels last in memory, as features come.
        noisy_BCHW = noisy_BCHW.to(features_BFHW.dtype, memory_format=torch.channels_last)
        x_BFHW = F.silu(self.conv1(torch.cat((features_BFHW, noisy_BCHW), dim=1)))
        return self.conv3(F.silu(self.conv2(x_BFHW)))
