"""Sizes and costs of the network of a training config. Nothing is downloaded or computed.

    python -m cdit.model describe --config configs/quickstart.yaml
    python -m cdit.model scale --config configs/nwm_cdit_xl.yaml

Autoencoders are assumed to have 4 latent channels and to downscale frames 8 times, like those of Stable Diffusion,
unless codec.name is a folder with a config.json.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cdit.common.cli import Command, parse_command, run
from cdit.model.hardware import Hardware
from cdit.training.config import TrainConfig

if TYPE_CHECKING:
    from cdit.model import CDiT

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@dataclass
class ScaleConfig(TrainConfig):
    """A training run, and the hardware it runs on."""

    hardware: Hardware = field(default_factory=Hardware)
    """The machines."""


COMMANDS = {
    "describe": Command(TrainConfig, "count parameters, tokens and FLOPs", QUICKSTART),
    "scale": Command(ScaleConfig, "estimate memory and communication on 1 to 512 GPUs", QUICKSTART),
}


def main() -> None:
    """The command line."""
    name, config = parse_command(COMMANDS, __doc__)
    config.validate()

    from cdit.model.describe import describe, table  # torch takes seconds to import: --help does not wait for it
    from cdit.model.scale import Run, tables

    cdit, line = network(config)
    data = config.data
    if name == "describe":
        print(line, table(describe(cdit, data.context_frames, data.goals)), sep="\n\n")
    else:
        trained = Run(
            cdit,
            data.context_frames,
            data.goals,
            config.batch_size,
            config.micro_batch_size,
            config.activation_checkpointing,
            config.optimizer.name,
        )
        line += f", {config.batch_size} contexts per step" + (", activations checkpointed" * trained.checkpointing)
        print(line, tables(trained, config.hardware), sep="\n\n")


def network(config: TrainConfig) -> "tuple[CDiT, str]":
    """The network of a config on the meta device, and a line about it."""
    import torch

    from cdit.codec.autoencoder import latent_shape
    from cdit.diffusion.objective import make_objective
    from cdit.model import CDiT

    channels, *size = latent_shape(config.codec, config.data.image_size)
    objective = make_objective(config)
    with torch.device("meta"):
        cdit = CDiT(
            tuple(size),
            channels,
            config.data.context_frames,
            learn_variance=objective.outputs == 2,
            **config.model.arguments(objective.conditioners),
        )
    kind = "pixels" if config.codec.kind == "pixels" else "latents"
    return cdit, (
        f"{config.name}: CDiT of {channels}×{size[0]}×{size[1]} ({kind}), "
        f"{config.data.context_frames} past frames, goals per context: {config.data.goals}"
        + (", without the embedding of texts, whose size the text encoder decides" if config.data.text_encoder else "")
    )


if __name__ == "__main__":
    run(main)
