"""Sizes and costs of the network of a config; nothing is downloaded or computed.

    python -m cdit.model describe --config configs/quickstart.yaml    parameters, tokens and FLOPs
    python -m cdit.model scale --config configs/nwm_cdit_xl.yaml      memory and communication on 1 to 512 GPUs

The network is built without memory for its weights. Autoencoders are taken to have 4 latent channels and to shrink
frames 8 times (those of Stable Diffusion), unless codec.name is a folder that says.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cdit.codec.autoencoder import latent_shape
from cdit.common.cli import parse_config, run
from cdit.common.errors import UserError
from cdit.diffusion.objective import make_objective
from cdit.model import CDiT
from cdit.model.describe import describe, table
from cdit.model.scale import Hardware, Run, tables
from cdit.training.config import TrainConfig

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@dataclass
class ScaleConfig(TrainConfig):
    """A training run, and the machines it is to run on."""

    hardware: Hardware = field(default_factory=Hardware)
    """The machines."""


def network(config: TrainConfig) -> tuple[CDiT, str]:
    """The config's network on the meta device, and a line about it."""
    channels, *size = latent_shape(config.codec, config.data.image_size)
    with torch.device("meta"):
        cdit = CDiT(
            tuple(size),
            channels,
            config.data.context_frames,
            learn_variance=make_objective(config).outputs == 2,
            **config.model.arguments(),
        )
    kind = "pixels" if config.codec.kind == "pixels" else "latents"
    return cdit, (
        f"{config.name}: CDiT of {channels}×{size[0]}×{size[1]} ({kind}), "
        f"{config.data.context_frames} past frames, goals per context: {config.data.goals}"
    )


def main() -> None:
    """The command line."""
    command, argv = sys.argv[1:2], sys.argv[2:]
    if command == ["describe"]:
        config = parse_config(TrainConfig, __doc__, argv, default_file=QUICKSTART)
        cdit, line = network(config)
        print(line, table(describe(cdit, config.data.context_frames, config.data.goals)), sep="\n\n")
    elif command == ["scale"]:
        config = parse_config(ScaleConfig, __doc__, argv, default_file=QUICKSTART)
        cdit, line = network(config)
        checkpointing, data = config.activation_checkpointing, config.data
        trained = Run(cdit, data.context_frames, data.goals, config.batch_size, config.micro_batch_size, checkpointing)
        line += f", {config.batch_size} contexts a step" + (", activations checkpointed" if checkpointing else "")
        print(line, tables(trained, config.hardware), sep="\n\n")
    else:
        raise UserError("usage: python -m cdit.model describe|scale [--config FILE] [--model.depth 6 …]")


if __name__ == "__main__":
    run(main)
