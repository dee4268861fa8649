"""What a CDiT is conditioned on: diffusion time, and conditioners by name, each a vector that is added to it.

Shape suffixes: B batch (one target each), D width.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from timm.layers import Mlp
from torch import Tensor, nn

from cdit.common.registry import Registry

FREQUENCIES = 256  # width of the sinusoidal features of a scalar

CONDITIONERS: Registry[type[nn.Module]] = Registry("model.extra_conditioners", nn.Module)
"""User-defined conditioners. A class is built with the width D. It maps the normalised conditions, a mapping from names
to tensors (…, any) with the leading dimensions of the targets, to (B, D), or to (1, D) for all of them."""


class ScalarEmbedding(nn.Module):
    """Sinusoidal features of a scalar times `scale` (cosines first, frequencies 1 … 1/10000), then a two-layer MLP."""

    def __init__(self, width: int, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.mlp = Mlp(FREQUENCIES, width, width, act_layer=nn.SiLU)

    def forward(self, x_B: Tensor) -> Tensor:
        """(B,) to (B, D)."""
        dtype = self.mlp.fc1.weight.dtype
        half = FREQUENCIES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=x_B.device) * -math.log(10_000) / half
        angles = self.scale * (x_B.to(torch.promote_types(dtype, torch.float32))[:, None] * exponents.exp())
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype))


class NoiseEmbedding(nn.Module):
    """Embeds the noise level of a past frame. Level 0 is always a zero: features are sines, and no map has a bias."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = Mlp(FREQUENCIES // 2, width, width, act_layer=nn.SiLU, bias=False)

    def forward(self, level_BT: Tensor) -> Tensor:
        """(B, T) standard deviations to (B, T, D)."""
        features = get_timestep_embedding(level_BT.flatten().float(), FREQUENCIES, scale=1000.0)
        sines = features[:, : FREQUENCIES // 2].unflatten(0, level_BT.shape)
        return self.mlp(sines.to(self.mlp.fc1.weight.dtype))


class TimeShiftConditioner(nn.Module):
    """Embeds `time_shift`."""

    def __init__(self, width: int, scale: float = 1.0):
        super().__init__()
        self.embedding = ScalarEmbedding(width, scale)

    def forward(self, condition: Mapping[str, Tensor]) -> Tensor:
        """(B, D)."""
        return self.embedding(condition["time_shift"].flatten())


@CONDITIONERS.register("interval")
class IntervalConditioner(nn.Module):
    """Embeds `interval`, the part of diffusion time that one step leads over, in [0, 1]; 0 if there is none."""

    def __init__(self, width: int):
        super().__init__()
        self.embedding = ScalarEmbedding(width, scale=30.0)

    def forward(self, condition: Mapping[str, Tensor]) -> Tensor:
        """(B, D), or (1, D) without an interval."""
        interval = condition.get("interval")
        if interval is None:
            interval = self.embedding.mlp.fc1.bias.new_zeros(1)
        return self.embedding(interval.flatten())


class TextConditioner(nn.Module):
    """Embeds `text`, a vector of `size` numbers of a text encoder, at any scale; a learned vector where it is zero, or
    if there is none.
    """

    def __init__(self, width: int, size: int):
        super().__init__()
        self.mlp = Mlp(size, width, width, act_layer=nn.SiLU)
        self.unknown = nn.Parameter(torch.zeros(width))

    def forward(self, condition: Mapping[str, Tensor]) -> Tensor:
        """(B, D), or (1, D) without a text."""
        if "text" not in condition:
            return self.unknown[None]
        text_BE = condition["text"].flatten(0, -2)
        known = (text_BE != 0).any(dim=-1, keepdim=True)
        embedding_BD = self.mlp(F.layer_norm(text_BE, text_BE.shape[-1:]).to(self.mlp.fc1.weight.dtype))
        return torch.where(known, embedding_BD, self.unknown.to(embedding_BD.dtype))


class ActionConditioner(nn.Module):
    """Embeds the `size` numbers of `action` (dx, dy, dyaw), each separately, and concatenates them; an unknown action
    is a learned vector.

    Actions are unknown where `action_known` is False (their values are ignored); all are if there is no `action`.
    """

    def __init__(self, width: int, scale: float = 1.0, size: int = 3):
        super().__init__()
        part = width // size
        widths = [part] * (size - 1) + [width - (size - 1) * part]
        self.parts = nn.ModuleList(ScalarEmbedding(w, scale) for w in widths)
        self.unknown = nn.Parameter(torch.zeros(width))

    def forward(self, condition: Mapping[str, Tensor]) -> Tensor:
        """(B, D)."""
        if "action" not in condition:
            return self.unknown[None]
        action_BK, known = condition["action"].reshape(-1, len(self.parts)), condition.get("action_known")
        if known is not None:
            known = known.flatten()[:, None]
            action_BK = action_BK.masked_fill(~known, 0.0)
        embedding_BD = torch.cat([part(x) for part, x in zip(self.parts, action_BK.unbind(-1), strict=True)], dim=-1)
        if known is None:
            return embedding_BD
        return torch.where(known, embedding_BD, self.unknown.to(embedding_BD.dtype))
