"""A world model of a published network, with everything that its checkpoint lacks."""

from cdit.codec import AutoencoderCodec
from cdit.common.errors import UserError
from cdit.diffusion import DDPMConfig, SamplerConfig
from cdit.model import CDiT
from cdit.nwm.normalization import normalization
from cdit.world_model import WorldDescription, WorldModel

FPS = 4.0


def published_world(cdit: CDiT, codec: AutoencoderCodec, spacing: float | None = None) -> WorldModel:
    """A world model of a published network and the autoencoder it was trained with.

    Args:
        cdit: from `load_checkpoint`.
        codec: of the latents.
        spacing: see `normalization`.

    Raises:
        UserError: the number of latent channels of the autoencoder does not match the network.
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
