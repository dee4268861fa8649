"""Plain implementations of what users would otherwise run, with the width of the CDiT they are compared with.

`PublishedCDiT` is the network of Navigation World Models (Bar et al. 2025, arXiv 2412.03572) with torch's and timm's
modules: keys and values of the past depend on the condition and are recomputed in every block, call and goal.
`ConcatDiT` is a DiT (Peebles & Xie 2023, arXiv 2212.09748) whose self-attention runs over the tokens of the past frames
and of the target together. Modules are named as in the published checkpoints.

Shape suffixes: B samples (a goal with its own copy of the past), T past frames, C channels, N tokens, D width.
"""

import math

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn


class Embedder(nn.Module):
    """Sinusoidal features of a number, and an MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, value_B: Tensor) -> Tensor:
        """(B, D)."""
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=value_B.device) / 128)
        angles = value_B[:, None].float() * frequencies
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1))


class ActionEmbedder(nn.Module):
    """One embedder for each of dx, dy and dyaw, concatenated."""

    def __init__(self, width: int):
        super().__init__()
        third = width // 3
        self.x_emb, self.y_emb, self.angle_emb = Embedder(third), Embedder(third), Embedder(width - 2 * third)

    def forward(self, action_B3: Tensor) -> Tensor:
        """(B, D)."""
        x, y, angle = action_B3.unbind(-1)
        return torch.cat((self.x_emb(x), self.y_emb(y), self.angle_emb(angle)), dim=-1)


def modulate(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """AdaLN's shift and scale."""
    return x_BND * (1 + scale_BD[:, None]) + shift_BD[:, None]


def norm(width: int) -> nn.LayerNorm:
    """LayerNorm without parameters."""
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


class PublishedBlock(nn.Module):
    """Self-attention, cross-attention to the modulated past, MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm_self, self.norm_past, self.norm_cross, self.norm_mlp = (norm(width) for _ in range(4))
        self.attn = Attention(width, heads, qkv_bias=True)
        self.cttn = nn.MultiheadAttention(width, heads, add_bias_kv=True, batch_first=True)
        self.mlp = Mlp(width, 4 * width, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 11 * width))

    def forward(self, x_BND: Tensor, past_BMD: Tensor, condition_BD: Tensor) -> Tensor:
        """The block's output, (B, N, D)."""
        m = self.adaLN_modulation(condition_BD).chunk(11, dim=-1)
        x = x_BND + m[2][:, None] * self.attn(modulate(self.norm_self(x_BND), m[0], m[1]))
        past = modulate(self.norm_past(past_BMD), m[3], m[4])
        query = modulate(self.norm_cross(x), m[5], m[6])
        x = x + m[7][:, None] * self.cttn(query, past, past, need_weights=False)[0]
        return x + m[10][:, None] * self.mlp(modulate(self.norm_mlp(x), m[8], m[9]))


class DiTBlock(nn.Module):
    """Self-attention and MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm_self, self.norm_mlp = norm(width), norm(width)
        self.attn = Attention(width, heads, qkv_bias=True)
        self.mlp = Mlp(width, 4 * width, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x_BND: Tensor, condition_BD: Tensor) -> Tensor:
        """The block's output, (B, N, D)."""
        m = self.adaLN_modulation(condition_BD).chunk(6, dim=-1)
        x = x_BND + m[2][:, None] * self.attn(modulate(self.norm_self(x_BND), m[0], m[1]))
        return x + m[5][:, None] * self.mlp(modulate(self.norm_mlp(x), m[3], m[4]))


class FinalLayer(nn.Module):
    """Values of a patch."""

    def __init__(self, width: int, values: int):
        super().__init__()
        self.norm = norm(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, values)

    def forward(self, x_BND: Tensor, condition_BD: Tensor) -> Tensor:
        """(B, N, values)."""
        return self.linear(modulate(self.norm(x_BND), *self.adaLN_modulation(condition_BD).chunk(2, dim=-1)))


class Peer(nn.Module):
    """Embeddings, blocks, and the final layer to twice as many channels, the second half for the variance."""

    block: type["PublishedBlock | DiTBlock"]

    def __init__(
        self, size: tuple[int, int], channels: int, frames: int, patch: int, width: int, depth: int, heads: int
    ):
        super().__init__()
        self.patch, self.grid = patch, (size[0] // patch, size[1] // patch)
        self.x_embedder = PatchEmbed(size, patch, channels, width)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(frames + 1, self.grid[0] * self.grid[1], width))
        self.t_embedder, self.time_embedder, self.y_embedder = Embedder(width), Embedder(width), ActionEmbedder(width)
        self.blocks = nn.ModuleList(self.block(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch**2 * 2 * channels)

    def embed(self, frames: Tensor) -> Tensor:
        """Tokens of frames (B, T, C, H, W) that end with the target: (B, T, N, D)."""
        x = self.x_embedder(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return x + self.pos_embed[-frames.shape[1] :]

    def condition(self, timestep: Tensor, action: Tensor, time_shift: Tensor) -> Tensor:
        """(B, D)."""
        return self.t_embedder(timestep) + self.time_embedder(time_shift) + self.y_embedder(action)

    def frame(self, x_BND: Tensor, condition_BD: Tensor) -> Tensor:
        """(B, 2·C, H, W)."""
        x = self.final_layer(x_BND, condition_BD)
        x = x.view(len(x), *self.grid, self.patch, self.patch, -1)
        return torch.einsum("bhwpqc->bchpwq", x).flatten(4, 5).flatten(2, 3)


class PublishedCDiT(Peer):
    """The network of Navigation World Models."""

    block = PublishedBlock

    def forward(self, sample: Tensor, timestep: Tensor, action: Tensor, time_shift: Tensor, past: Tensor) -> Tensor:
        """Sample (B, C, H, W), timestep and time_shift (B,), action (B, 3), past (B, T, C, H, W)."""
        tokens = self.embed(torch.cat((past, sample[:, None]), dim=1))
        x, context = tokens[:, -1], tokens[:, :-1].flatten(1, 2)
        condition = self.condition(timestep, action, time_shift)
        for block in self.blocks:
            x = block(x, context, condition)
        return self.frame(x, condition)


class ConcatDiT(Peer):
    """A DiT over past and target together."""

    block = DiTBlock

    def forward(self, sample: Tensor, timestep: Tensor, action: Tensor, time_shift: Tensor, past: Tensor) -> Tensor:
        """Sample (B, C, H, W), timestep and time_shift (B,), action (B, 3), past (B, T, C, H, W)."""
        x = self.embed(torch.cat((past, sample[:, None]), dim=1)).flatten(1, 2)
        condition = self.condition(timestep, action, time_shift)
        for block in self.blocks:
            x = block(x, condition)
        return self.frame(x[:, -self.grid[0] * self.grid[1] :], condition)
