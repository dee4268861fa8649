"""Codecs: frames to and from what the network denoises (pixels, or the latents of an autoencoder of diffusers)."""

import hashlib
from pathlib import Path
from typing import Literal

import diffusers
import torch
from torch import Tensor, nn

from cdit.codec.config import CodecConfig
from cdit.common.errors import UserError

UNSEEN_IN_WEIGHTS = ("act_fn", "norm_num_groups")
"""Settings that change what an encoder computes, and not the names and shapes of its weights."""


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

    def as_past(self, sampled: Tensor) -> Tensor:
        """What of a sampled frame joins the past frames: it clipped, as recorded ones are."""
        return self.decode(sampled)


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

    def encode(self, frames: Tensor, noise: Tensor | None = None) -> Tensor:
        """(…, 3, H, W) in [-1, 1] to latents (…, C, H / downscale, W / downscale).

        AutoencoderKL's posterior is sampled with the given standard-normal noise; without it, its mean is taken.
        """
        return self.draw(self.moments(frames), noise)

    @torch.no_grad()
    def moments(self, frames: Tensor) -> Tensor:
        """What the encoder says of frames (…, 3, H, W): (…, S, C, h, w), for `draw`.

        S = 2 for AutoencoderKL, the mean and standard deviation of its posterior; 1 for AutoencoderTiny, its latents.
        """
        flat = frames.flatten(0, -4)
        if self.samples:
            posterior = self.autoencoder.encode(flat).latent_dist
            moments = torch.stack((posterior.mean, posterior.std), dim=1)
        else:
            moments = self.autoencoder.encode(flat).latents[:, None]
        return moments.unflatten(0, frames.shape[:-3])

    def draw(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (…, C, h, w) from moments (…, S, C, h, w), by standard-normal noise where there is a posterior."""
        latents = moments.select(-4, 0)
        if self.samples and noise is not None:
            latents = latents + moments.select(-4, 1) * noise
        return (latents - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to frames clipped to [-1, 1]."""
        frames = self.autoencoder.decode(latents.flatten(0, -4) / self.scale + self.shift).sample
        return frames.clamp(-1, 1).unflatten(0, latents.shape[:-3])

    def as_past(self, sampled: Tensor) -> Tensor:
        """What of sampled latents joins those of past frames: they themselves."""
        return sampled

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of what `moments` depends on: the encoder's weights, and how it uses them."""
        settings = {name: self.autoencoder.config.get(name) for name in UNSEEN_IN_WEIGHTS}
        digest = hashlib.sha256(f"{self.kind} {settings}".encode())
        for name, weights in sorted(self.autoencoder.state_dict().items()):
            if name.startswith(("encoder.", "quant_conv.")):
                digest.update(f"{name} {weights.dtype} {tuple(weights.shape)}".encode())
                digest.update(weights.cpu().contiguous().numpy())
        return digest.hexdigest()


Codec = PixelCodec | AutoencoderCodec


def latent_size(codec: Codec, image_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the latents of frames of that height and width.

    Raises:
        UserError: the codec cannot shrink them evenly.
    """
    height, width = image_size
    if height % codec.downscale or width % codec.downscale:
        raise UserError(f"data.image_size is {height}×{width}, expected multiples of the codec's {codec.downscale}")
    return height // codec.downscale, width // codec.downscale


def load_codec(config: CodecConfig) -> Codec:
    """Builds the codec.

    Raises:
        UserError: the autoencoder is neither a folder nor to be had from the hub.
    """
    if config.kind == "pixels":
        return PixelCodec()
    autoencoder_class = {"kl": diffusers.AutoencoderKL, "tiny": diffusers.AutoencoderTiny}[config.kind]
    try:
        return AutoencoderCodec(config.kind, autoencoder_class.from_pretrained(config.name, use_safetensors=True))
    except (OSError, ValueError) as error:
        where = "that folder" if Path(config.name).is_dir() else "the Hugging Face hub (is the network reachable?)"
        raise UserError(
            f"codec.name {config.name!r}: no {autoencoder_class.__name__} weights from {where}. "
            f"Give a folder written by save_pretrained, or use codec.kind pixels. ({str(error).splitlines()[0]})"
        ) from error
