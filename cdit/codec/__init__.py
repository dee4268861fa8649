"""Codecs: frames to and from what the network denoises (pixels, latents of an autoencoder, features of a backbone)."""

from cdit.codec.config import CodecConfig
from cdit.common.lazy import lazy_names

__all__ = [
    "CODECS",
    "AutoencoderCodec",
    "Codec",
    "CodecConfig",
    "FeaturesCodec",
    "KLCodec",
    "PixelCodec",
    "TinyCodec",
    "load_codec",
]
__getattr__ = lazy_names(
    __name__,
    codec="CODECS Codec PixelCodec load_codec",
    autoencoder="AutoencoderCodec KLCodec TinyCodec",
    features="FeaturesCodec",
)
