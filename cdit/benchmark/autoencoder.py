"""An autoencoder of the size people use, with random weights: what it costs does not depend on them."""

from diffusers import AutoencoderKL


def random_autoencoder(blocks: list[int], channels: int = 4) -> AutoencoderKL:
    """Of Stable Diffusion's architecture."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks),
        block_out_channels=blocks,
        layers_per_block=2,
        latent_channels=channels,
    )
