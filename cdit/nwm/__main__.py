"""Converts checkpoints of the published Navigation World Models to world models of this package, and back.

    python -m cdit.nwm convert CHECKPOINT OUT
    python -m cdit.nwm export WORLD OUT

A checkpoint holds the network alone. `convert` adds the published autoencoder, units, frame rate and sampler. An
exported network expects frames and actions in the units it was trained with.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cdit.codec.config import DEFAULT_WEIGHTS
from cdit.common.cli import Command, parse_command, run
from cdit.common.errors import UserError

if TYPE_CHECKING:
    from cdit.world_model import WorldModel


@dataclass
class ConvertConfig:
    """What to convert."""

    checkpoint: str
    """The published file, *.pth.tar."""
    out: str
    """Folder for the world model. A world model in it is replaced."""
    weights: Literal["ema", "model"] = "ema"
    """The averaged weights, which the published evaluation uses, or the trained ones."""
    codec: str = DEFAULT_WEIGHTS["kl"]
    """Hub name or local folder of the AutoencoderKL."""
    spacing: float | None = None
    """Metres between consecutive frames of the dataset to use the model on (RECON 0.25, SCAND 0.38, HuRoN 0.255,
    TartanDrive 0.72). By default, it has to be passed in every call of the model."""
    num_heads: int | None = None
    """Heads of each attention; by default those of the published network of that width and depth."""


@dataclass
class ExportConfig:
    """What to export."""

    world: str
    """Folder of a world model or of a training run."""
    out: str
    """The file to write, *.pth.tar. A checkpoint there is replaced."""


COMMANDS = {
    "convert": Command(ConvertConfig, "convert a published *.pth.tar file to a world model", positional=True),
    "export": Command(ExportConfig, "export a world model or training run to a *.pth.tar file", positional=True),
}


def main() -> None:
    """The command line."""
    name, config = parse_command(COMMANDS, __doc__)
    (convert if name == "convert" else export)(config)


def convert(config: ConvertConfig) -> None:
    """A published checkpoint to a world model's folder.

    Raises:
        UserError: bad input, or the folder holds something else.
    """
    if config.spacing is not None and config.spacing <= 0:
        raise UserError(f"spacing is {config.spacing:g}, expected more than 0")

    from cdit.codec import CodecConfig, load_codec  # imports torch
    from cdit.nwm.checkpoint import load_checkpoint
    from cdit.nwm.world import published_world
    from cdit.world_model import DESCRIPTION

    out = Path(config.out)
    if out.exists() and not (out / DESCRIPTION).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: exists, and is not a world model that could be replaced")
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
        UserError: the folder holds no world model, or one that differs from NWM, or the file holds something else.
    """
    from cdit.nwm.checkpoint import save_checkpoint  # imports torch
    from cdit.nwm.tensors import differences
    from cdit.world_model import WorldModel

    world = WorldModel.from_pretrained(config.world)
    different = differences(world.cdit)
    if world.description.objective != "ddpm":
        different.append(f"objective is {world.description.objective}, not ddpm")
    if different:
        raise UserError(f"{config.world}: not a model of NWM: {'; '.join(different)}")
    save_checkpoint(world.cdit, config.out)
    print(f"{config.out}: {_summary(world)}")


def _summary(world: "WorldModel") -> str:
    size, network = world.description.image_size, world.cdit.config
    return (
        f"{network.depth} blocks of width {network.hidden_size}, {network.max_context} past frames "
        f"of {size[0]}×{size[1]} pixels"
    )


if __name__ == "__main__":
    run(main)
