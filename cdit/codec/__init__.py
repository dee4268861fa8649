"""Codecs: frames to and from what the network denoises (pixels, or the latents of an autoencoder of diffusers)."""

from cdit.codec.config import CodecConfig
from cdit.common.lazy import lazy_names

__all__ = ["AutoencoderCodec", "Codec", "CodecConfig", "PixelCodec", "latent_size", "load_codec"]
__getattr__ = lazy_names(__name__, codecs="AutoencoderCodec Codec PixelCodec latent_size load_codec")
