"""Checkpoints of the published Navigation World Models, to and from the world models of this package.

    python -m cdit.nwm convert CHECKPOINT OUT    a *.pth.tar file to a world model's folder
    python -m cdit.nwm export WORLD OUT          a world model's or training run's folder to a *.pth.tar file

A checkpoint holds the network alone. Converting adds the published autoencoder, units, frame rate and sampler; what is
exported has to be fed frames and actions in the units it was trained with.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cdit.codec import CodecConfig, load_codec
from cdit.common.cli import parse_config, run
from cdit.common.errors import UserError
from cdit.nwm.checkpoint import load_checkpoint, save_checkpoint
from cdit.nwm.tensors import differences
from cdit.nwm.world import published_world
from cdit.world_model import DESCRIPTION, WorldModel


@dataclass
class ConvertConfig:
    """What to convert."""

    checkpoint: str
    """The published file, *.pth.tar."""
    out: str
    """Folder for the world model; one that is there already is replaced."""
    weights: Literal["ema", "model"] = "ema"
    """The averaged weights, which the published evaluation uses, or those that were trained."""
    codec: str = CodecConfig.name
    """Hub name or local folder of the AutoencoderKL."""
    spacing: float | None = None
    """Metres between consecutive frames of the dataset that the model is for (RECON 0.25, SCAND 0.38, HuRoN 0.255,
    TartanDrive 0.72); by default each call of the model has to say it."""
    num_heads: int | None = None
    """Heads of each attention; by default those of the published network of that width and depth."""


@dataclass
class ExportConfig:
    """What to export."""

    world: str
    """Folder of a world model, or of a training run."""
    out: str
    """The file; a checkpoint that is there already is replaced."""


def convert(config: ConvertConfig) -> None:
    """A published checkpoint to a world model's folder.

    Raises:
        UserError: bad input, or the folder holds something else.
    """
    if config.spacing is not None and config.spacing <= 0:
        raise UserError(f"spacing is {config.spacing:g}, expected more than 0")
    out = Path(config.out)
    if out.exists() and not (out / DESCRIPTION).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: is there already and no world model that could be replaced")
    cdit = load_checkpoint(config.checkpoint, config.weights, config.num_heads)
    world = published_world(cdit, load_codec(CodecConfig("kl", config.codec)), config.spacing)
    try:
        world.save_pretrained(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from error
    print(f"{out}: {_summary(world)}")


def export(config: ExportConfig) -> None:
    """A world model to a checkpoint in the published layout.

    Raises:
        UserError: no world model, one of another network or objective, or the file is something else.
    """
    world = WorldModel.from_pretrained(config.world)
    different = differences(world.cdit)
    if world.description.objective != "ddpm":
        different.append(f"objective is {world.description.objective}, not ddpm")
    if different:
        raise UserError(f"{config.world}: not a model of NWM: {'; '.join(different)}")
    save_checkpoint(world.cdit, config.out)
    print(f"{config.out}: {_summary(world)}")


def _summary(world: WorldModel) -> str:
    size, network = world.description.image_size, world.cdit.config
    return (
        f"{network.depth} blocks of width {network.hidden_size}, {network.max_context} past frames "
        f"of {size[0]}×{size[1]} pixels"
    )


COMMANDS = {"convert": (ConvertConfig, convert), "export": (ExportConfig, export)}


def main() -> None:
    """The command line."""
    if sys.argv[1:2] in (["--help"], ["-h"]):
        print(f"{__doc__}\nOptions: python -m cdit.nwm convert --help")
        return
    if not sys.argv[1:] or sys.argv[1] not in COMMANDS:
        raise UserError("usage: python -m cdit.nwm convert CHECKPOINT OUT [--spacing 0.25 …] or export WORLD OUT")
    config_class, command = COMMANDS[sys.argv[1]]
    command(parse_config(config_class, __doc__.partition("\n")[0], sys.argv[2:], positional=True))


if __name__ == "__main__":
    run(main)
