"""Embeddings of the scalars a CDiT is conditioned on: diffusion time, time shift, action.

Shape suffixes: B batch, D width.
"""

import torch
from diffusers.models.embeddings import get_timestep_embedding
from timm.layers import Mlp
from torch import Tensor, nn

FREQUENCIES = 256  # width of the sinusoidal features of a scalar


class ScalarEmbedding(nn.Module):
    """Sinusoidal features of a scalar times `scale` (cosines first, frequencies 1 … 1/10000), then a two-layer MLP."""

    def __init__(self, width: int, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.mlp = Mlp(FREQUENCIES, width, width, act_layer=nn.SiLU)

    def forward(self, x_B: Tensor) -> Tensor:
        """(B,) to (B, D)."""
        dtype = self.mlp.fc1.weight.dtype
        features = get_timestep_embedding(
            x_B.to(torch.promote_types(dtype, torch.float32)),
            FREQUENCIES,
            flip_sin_to_cos=True,
            downscale_freq_shift=0,
            scale=self.scale,
        )
        return self.mlp(features.to(dtype))


class ActionEmbedding(nn.Module):
    """Embeds (dx, dy, dyaw) apart and concatenates them; an unknown action becomes a learned vector."""

    def __init__(self, width: int, scale: float = 1.0):
        super().__init__()
        third = width // 3
        self.parts = nn.ModuleList(ScalarEmbedding(w, scale) for w in (third, third, width - 2 * third))
        self.unknown = nn.Parameter(torch.zeros(width))

    def forward(self, action_B3: Tensor, mask_B: Tensor | None) -> Tensor:
        """(B, 3) to (B, D); a False in the mask marks an unknown action, whose numbers are not looked at."""
        if mask_B is not None:
            action_B3 = action_B3.masked_fill(~mask_B[:, None], 0.0)
        embedding_BD = torch.cat([part(x) for part, x in zip(self.parts, action_B3.unbind(-1), strict=True)], dim=-1)
        if mask_B is None:
            return embedding_BD
        return torch.where(mask_B[:, None], embedding_BD, self.unknown.to(embedding_BD.dtype))
