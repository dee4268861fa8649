"""An autoencoder of the size people use, with random weights: what it costs does not depend on them."""

from diffusers import AutoencoderKL

from cdit.benchmark.config import BenchmarkConfig
from cdit.codec import AutoencoderCodec


def random_codec(config: BenchmarkConfig) -> AutoencoderCodec:
    """Of Stable Diffusion's architecture, with the config's blocks and channels, on the CPU."""
    blocks = config.codec.blocks
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks),
        block_out_channels=blocks,
        layers_per_block=2,
        latent_channels=config.channels,
    )
    return AutoencoderCodec("kl", autoencoder)
