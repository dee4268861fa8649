"""`python -m cdit.model describe --config configs/quickstart.yaml`: parameters, tokens and FLOPs of a config's network.

Nothing is downloaded or computed: the network is built without memory for its weights. Autoencoders are taken to have
4 latent channels and to shrink frames 8 times (those of Stable Diffusion), unless codec.name is a folder that says.
"""

import sys
from pathlib import Path

import torch

from cdit.cli import parse_config, run
from cdit.errors import UserError
from cdit.model import CDiT
from cdit.model.describe import describe, latent_shape, table
from cdit.training.config import TrainConfig

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def main() -> None:
    """The command line."""
    if sys.argv[1:2] != ["describe"]:
        raise UserError("usage: python -m cdit.model describe [--config FILE] [--model.depth 6 …]")
    config = parse_config(TrainConfig, __doc__, sys.argv[2:], default_file=QUICKSTART)
    channels, *size = latent_shape(config.codec, config.data.image_size)
    with torch.device("meta"):
        cdit = CDiT(tuple(size), channels, config.data.context_frames, **config.model.arguments())
    print(
        f"{config.name}: CDiT of {channels}×{size[0]}×{size[1]} "
        f"({'pixels' if config.codec.kind == 'pixels' else 'latents'}), "
        f"{config.data.context_frames} past frames, goals per context: {config.data.goals}\n"
    )
    print(table(describe(cdit, config.data.context_frames, config.data.goals)))


if __name__ == "__main__":
    run(main)
