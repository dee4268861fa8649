"""The interface of a codec, and the codec of raw pixels."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn
from typing_extensions import Self

from cdit.codec.config import CodecConfig
from cdit.common.errors import UserError
from cdit.common.registry import Registry


class Codec(nn.Module, ABC):
    """Frames (…, 3, H, W) in [-1, 1] to and from latents (…, C, H / downscale, W / downscale), which are denoised.

    A subclass sets the attributes below and implements the abstract methods. It is registered in `CODECS` or named by
    its import path.
    """

    kind: str
    """A name that `CODECS` knows it by; by default its import path."""
    channels: int
    downscale: int = 1
    lossless: bool = False
    """Whether `decode` reconstructs frames exactly."""
    samples: bool = False
    """Whether `encode` draws latents from a posterior."""
    has_decoder: bool = True
    """Whether `decode` generates frames. Otherwise it returns recorded ones, for which no metrics are computed."""
    rank: Callable[[Tensor, Tensor], Tensor] | None = None
    """Predicted and true latents (N, C, h, w) to the shares (N,) of recorded frames that are further from a prediction
    than the truth is, for codecs that can have no decoder."""
    moments: Callable[[Tensor], Tensor] | None = None
    """Frames to moments (…, S, C, h, w), from which `draw` makes latents: S = 2 for the mean and standard deviation of
    a posterior, otherwise S = 1. `cdit.data.encode` stores them on disk. None: not worth storing."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "kind" not in vars(cls):
            cls.kind = f"{cls.__module__}:{cls.__qualname__}"

    @abstractmethod
    def encode(self, frames: Tensor, noise: Tensor | None = None) -> Tensor:
        """Frames to latents. If there is a posterior, draws from it with standard-normal noise, or returns its mean."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to frames, clipped to [-1, 1]; differentiable, for a perceptual loss."""

    @classmethod
    @abstractmethod
    def load(cls, name: str) -> Self:
        """The codec of a hub name, or of a folder that `save` wrote.

        Raises:
            UserError: there are no such weights.
        """

    def draw(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (…, C, h, w) from moments (…, S, C, h, w)."""
        latents = moments.select(-4, 0)
        return latents if noise is None or not self.samples else latents + moments.select(-4, 1) * noise

    def as_past(self, sampled: Tensor) -> Tensor:
        """Sampled latents in the form in which they join the past frames in a rollout."""
        return sampled

    def fingerprint(self) -> str:
        """A string that changes whenever `moments` change."""
        return self.kind

    def save(self, folder: Path) -> None:
        """Writes what `load` needs to a folder; by default nothing."""

    def latent_shape(self, image_size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of the latents of frames of that height and width.

        Raises:
            UserError: the frame size is not a multiple of the downscaling.
        """
        return shape_of_latents(self.channels, self.downscale, image_size)


CODECS: Registry[type[Codec]] = Registry("codec.kind", Codec)


@CODECS.register("pixels")
class PixelCodec(Codec):
    """Raw pixels."""

    kind = "pixels"
    channels = 3
    lossless = True

    def encode(self, frames: Tensor, noise: Tensor | None = None) -> Tensor:
        """Frames unchanged."""
        return frames

    def decode(self, latents: Tensor) -> Tensor:
        """Clipped to [-1, 1]."""
        return latents.clamp(-1, 1)

    def as_past(self, sampled: Tensor) -> Tensor:
        """Clipped to [-1, 1], as recorded frames are."""
        return self.decode(sampled)

    @classmethod
    def load(cls, name: str) -> Self:
        """The codec."""
        return cls()


def shape_of_latents(channels: int, downscale: int, image_size: tuple[int, int]) -> tuple[int, int, int]:
    """See `Codec.latent_shape`."""
    height, width = image_size
    if height % downscale or width % downscale:
        raise UserError(f"data.image_size is {height}×{width}, expected multiples of the codec's {downscale}")
    return channels, height // downscale, width // downscale


def load_codec(config: CodecConfig) -> Codec:
    """The codec of a config.

    Raises:
        UserError: the kind is unknown, or its weights are not available.
    """
    import cdit.codec.autoencoder
    import cdit.codec.features  # noqa: F401 (both register their codecs)

    return CODECS.get(config.kind).load(config.weights)
