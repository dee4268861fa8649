"""The codec section of a config."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class CodecConfig:
    """What the network denoises."""

    kind: Literal["pixels", "kl", "tiny"] = "pixels"
    """Raw pixels, or the latents of diffusers' AutoencoderKL or AutoencoderTiny."""
    name: str = "stabilityai/sd-vae-ft-ema"
    """Hub name or local folder of the autoencoder (for tiny: madebyollin/taesd)."""
