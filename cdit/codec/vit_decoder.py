"""A vision transformer that decodes features to pictures."""

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block, init_weights_vit_timm
from torch import Tensor, nn

from cdit.common.errors import UserError

HEAD_WIDTH = 64


class VitDecoder(nn.Module):
    """Blocks of timm over the tokens of a frame, then a linear map from each token to its pixels.

    RAE (Zheng et al. 2025, arXiv 2510.11690) decodes with such a transformer. The position embedding is learned, and
    interpolated (bicubic) for frames of another size than the decoder was trained on.

    Args:
        channels: C of the features.
        patch: side of a token in pixels.
        width: of a token in the decoder, a multiple of 64, the width of a head.
        depth: number of blocks.
        grid: rows and columns of tokens of the frames it is trained on.

    Raises:
        UserError: the width is no multiple of 64.
    """

    def __init__(self, channels: int, patch: int, width: int, depth: int, grid: tuple[int, int]):
        super().__init__()
        if width % HEAD_WIDTH:
            raise UserError(f"width is {width}, expected a multiple of {HEAD_WIDTH} for a vit decoder")
        self.patch, self.grid = patch, tuple(grid)
        self.embed = nn.Linear(channels, width)
        self.pos_embed = nn.Parameter(torch.empty(1, grid[0] * grid[1], width))
        self.blocks = nn.Sequential(*(Block(width, width // HEAD_WIDTH, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.to_pixels = nn.Linear(width, 3 * patch**2)
        self.apply(init_weights_vit_timm)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, latents: Tensor) -> Tensor:
        """Features (N, C, h, w) to frames (N, 3, h·patch, w·patch)."""
        size = latents.shape[-2:]
        position = resample_abs_pos_embed(self.pos_embed, size, self.grid, num_prefix_tokens=0)
        tokens = self.blocks(self.embed(latents.flatten(2).transpose(1, 2)) + position)
        pixels = self.to_pixels(self.norm(tokens)).transpose(1, 2).unflatten(2, size)
        return F.pixel_shuffle(pixels, self.patch)
