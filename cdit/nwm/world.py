"""What a published Navigation World Models checkpoint does not hold: units, frame rate, autoencoder, sampler."""

from cdit.codec import AutoencoderCodec
from cdit.diffusion import DDPMConfig, SamplerConfig
from cdit.errors import UserError
from cdit.model import CDiT
from cdit.world_model import Units, WorldDescription, WorldModel

FPS = 4.0
TIME_UNIT = 128
"""Frames; time shifts are in these."""
RANGES = ((-2.5, 5.0), (-4.0, 4.0))
"""Of dx and dy, in spacings: what the network sees as -1 … 1. Nothing is clipped."""


def normalization(fps: float = FPS, spacing: float | None = None) -> Units:
    """The units of the published training.

    Args:
        fps: frames a second.
        spacing: metres between consecutive frames of the dataset at hand; None: to be said in each call.
    """
    (x_scale, x_offset), (y_scale, y_offset) = (
        (2 / (high - low), -(high + low) / (high - low)) for low, high in RANGES
    )
    return Units(
        action_scale=(x_scale, y_scale, 1.0),
        action_offset=(x_offset, y_offset, 0.0),
        time_scale=fps / TIME_UNIT,
        spacing=spacing,
    )


def published_world(cdit: CDiT, codec: AutoencoderCodec, spacing: float | None = None) -> WorldModel:
    """A world model of a published network and the autoencoder it was trained with.

    Args:
        cdit: of `load_checkpoint`.
        codec: of the latents.
        spacing: see `normalization`.

    Raises:
        UserError: the autoencoder's latents have another number of channels than the network takes.
    """
    if codec.channels != cdit.config.in_channels:
        raise UserError(
            f"codec: its latents have {codec.channels} channels, expected the network's {cdit.config.in_channels}"
        )
    height, width = cdit.config.image_size
    description = WorldDescription(
        image_size=(height * codec.downscale, width * codec.downscale),
        fps=FPS,
        crop="4:3",
        min_history=cdit.config.max_context,
        units=normalization(FPS, spacing),
        objective="ddpm",
        ddpm=DDPMConfig(learn_variance=True),
        sampler=SamplerConfig(scheduler="ddpm", steps=250),
    )
    return WorldModel(cdit, codec, description).eval()
