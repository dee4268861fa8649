"""Latents of the autoencoders of diffusers."""

import hashlib
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from typing_extensions import Self

from cdit.codec.codec import CODECS, Codec, shape_of_latents
from cdit.codec.config import DEFAULT_WEIGHTS, CodecConfig
from cdit.common.errors import UserError
from cdit.common.weights import weight_shapes

UNSEEN_IN_WEIGHTS = ("act_fn", "norm_num_groups")
"""Settings that change what an encoder computes but not the names and shapes of its weights."""


class AutoencoderCodec(Codec):
    """A frozen autoencoder of diffusers, with latents shifted and scaled to unit variance according to its config."""

    autoencoder_class: type[nn.Module]

    def __init__(self, autoencoder: nn.Module):
        super().__init__()
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        config = autoencoder.config
        self.channels, self.downscale = sizes(config)
        self.scale: float = config.scaling_factor
        self.shift: float = getattr(config, "shift_factor", None) or 0.0

    def encode(self, frames: Tensor, noise: Tensor | None = None) -> Tensor:
        """Frames to latents."""
        return self.draw(self.moments(frames), noise)

    def draw(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents from moments, shifted and scaled."""
        return (super().draw(moments, noise) - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to frames clipped to [-1, 1]."""
        frames = self.autoencoder.decode(latents.flatten(0, -4) / self.scale + self.shift).sample
        return frames.clamp(-1, 1).unflatten(0, latents.shape[:-3])

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the encoder's weights and settings, on which `moments` depends."""
        settings = {name: self.autoencoder.config.get(name) for name in UNSEEN_IN_WEIGHTS}
        digest = hashlib.sha256(f"{self.kind} {settings}".encode())
        for name, weights in sorted(self.autoencoder.state_dict().items()):
            if name.startswith(("encoder.", "quant_conv.")):
                digest.update(f"{name} {weights.dtype} {tuple(weights.shape)}".encode())
                digest.update(weights.cpu().contiguous().numpy())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Writes the autoencoder with its `save_pretrained`."""
        self.autoencoder.save_pretrained(folder)

    @classmethod
    def load(cls, name: str) -> Self:
        """The autoencoder of a hub name or local folder.

        Raises:
            UserError: its weights are not available, or do not match its config.
        """
        try:
            if Path(name).is_dir():
                weight_shapes(Path(name))
            return cls(cls.autoencoder_class.from_pretrained(name, use_safetensors=True))
        except (OSError, ValueError, UserError) as error:
            where = "that folder" if Path(name).is_dir() else "the Hugging Face hub (is the network reachable?)"
            raise UserError(
                f"codec.name {name!r}: no {cls.autoencoder_class.__name__} weights from {where}. "
                f"Give a folder written by save_pretrained, or use codec.kind pixels. ({str(error).splitlines()[0]})"
            ) from error


@CODECS.register("kl")
class KLCodec(AutoencoderCodec):
    """Latents of an AutoencoderKL, drawn from its posterior if noise is given."""

    kind = "kl"
    samples = True
    autoencoder_class = diffusers.AutoencoderKL

    @torch.no_grad()
    def moments(self, frames: Tensor) -> Tensor:
        """(…, 2, C, h, w): mean and standard deviation of the posterior."""
        posterior = self.autoencoder.encode(frames.flatten(0, -4)).latent_dist
        return torch.stack((posterior.mean, posterior.std), dim=1).unflatten(0, frames.shape[:-3])


@CODECS.register("tiny")
class TinyCodec(AutoencoderCodec):
    """Latents of an AutoencoderTiny."""

    kind = "tiny"
    autoencoder_class = diffusers.AutoencoderTiny

    @torch.no_grad()
    def moments(self, frames: Tensor) -> Tensor:
        """(…, 1, C, h, w): the latents."""
        return self.autoencoder.encode(frames.flatten(0, -4)).latents[:, None].unflatten(0, frames.shape[:-3])


def sizes(config: Any) -> tuple[int, int]:
    """Latent channels and downscaling of an autoencoder's config."""
    config = dict(config)
    blocks = config.get("encoder_block_out_channels") or config["block_out_channels"]
    return config["latent_channels"], 2 ** (len(blocks) - 1)


def latent_shape(codec: CodecConfig, image_size: tuple[int, int]) -> tuple[int, int, int]:
    """(C, h, w) of the latents of frames of a size, without an autoencoder's weights.

    Reads only the config of an autoencoder, from a folder, the hub's cache, or the hub; not for default autoencoders.

    Raises:
        UserError: the config is not available, or the frame size is not a multiple of the downscaling.
    """
    import cdit.codec.features  # noqa: F401 (registers its codec)

    kind = CODECS.get(codec.kind)
    if not issubclass(kind, AutoencoderCodec):
        return kind.load(codec.weights).latent_shape(image_size)
    if codec.weights in DEFAULT_WEIGHTS.values():
        return shape_of_latents(4, 8, image_size)
    try:
        config = kind.autoencoder_class.load_config(codec.weights)
        return shape_of_latents(*sizes(config), image_size)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"codec.name {codec.weights!r}: no config of an autoencoder there ({error})") from error
