"""Codecs: frames to and from what the network denoises (pixels, or the latents of an autoencoder of diffusers)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import diffusers
import torch
from torch import Tensor, nn

from cdit.errors import UserError


@dataclass
class CodecConfig:
    """What the network denoises."""

    kind: Literal["pixels", "kl", "tiny"] = "pixels"
    """Raw pixels, or the latents of diffusers' AutoencoderKL or AutoencoderTiny."""
    name: str = "stabilityai/sd-vae-ft-ema"
    """Hub name or local folder of the autoencoder (for tiny: madebyollin/taesd)."""


class PixelCodec(nn.Module):
    """Frames as they are."""

    kind = "pixels"
    channels = 3
    downscale = 1
    samples = False  # whether encode draws

    def encode(self, frames: Tensor, noise: Tensor | None = None) -> Tensor:
        """Frames unchanged; the noise is not used."""
        return frames

    def decode(self, latents: Tensor) -> Tensor:
        """Clipped to [-1, 1]."""
        return latents.clamp(-1, 1)


class AutoencoderCodec(nn.Module):
    """A frozen autoencoder of diffusers, its latents shifted and scaled to unit variance as its config says."""

    def __init__(self, kind: Literal["kl", "tiny"], autoencoder: nn.Module):
        super().__init__()
        self.kind = kind
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        config = autoencoder.config
        self.samples = kind == "kl"
        self.channels: int = config.latent_channels
        blocks = config.block_out_channels if kind == "kl" else config.encoder_block_out_channels
        self.downscale: int = 2 ** (len(blocks) - 1)
        self.scale: float = config.scaling_factor
        self.shift: float = getattr(config, "shift_factor", None) or 0.0

    @torch.no_grad()
    def encode(self, frames: Tensor, noise: Tensor | None = None) -> Tensor:
        """(…, 3, H, W) in [-1, 1] to latents (…, C, H / downscale, W / downscale).

        AutoencoderKL's posterior is sampled with the given standard-normal noise; without it, its mean is taken.
        """
        flat = frames.flatten(0, -4)
        if self.kind == "tiny":
            latents = self.autoencoder.encode(flat).latents
        else:
            posterior = self.autoencoder.encode(flat).latent_dist
            latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise.flatten(0, -4)
        return ((latents - self.shift) * self.scale).unflatten(0, frames.shape[:-3])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to frames clipped to [-1, 1]."""
        frames = self.autoencoder.decode(latents.flatten(0, -4) / self.scale + self.shift).sample
        return frames.clamp(-1, 1).unflatten(0, latents.shape[:-3])


Codec = PixelCodec | AutoencoderCodec


def load_codec(config: CodecConfig) -> Codec:
    """Builds the codec.

    Raises:
        UserError: the autoencoder is neither a folder nor to be had from the hub.
    """
    if config.kind == "pixels":
        return PixelCodec()
    autoencoder_class = {"kl": diffusers.AutoencoderKL, "tiny": diffusers.AutoencoderTiny}[config.kind]
    try:
        return AutoencoderCodec(config.kind, autoencoder_class.from_pretrained(config.name))
    except (OSError, ValueError) as error:
        where = "that folder" if Path(config.name).is_dir() else "the Hugging Face hub (is the network reachable?)"
        raise UserError(
            f"codec.name {config.name!r}: no {autoencoder_class.__name__} weights from {where}. "
            f"Give a folder written by save_pretrained, or use codec.kind pixels. ({str(error).splitlines()[0]})"
        ) from error
