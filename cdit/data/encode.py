"""Encodes the frames of a dataset once, so that training on latents reads them instead of images.

    python -m cdit.data.encode --config configs/mine.yaml
    python -m cdit.data.encode --data.folder data/recon --data.image_size [224,224] --data.crop 4:3 --codec.kind kl
    accelerate launch --multi_gpu --num_processes 8 -m cdit.data.encode --config configs/mine.yaml

Reads the sections data and codec of a training config and writes the folder latents/ into the dataset, trajectory by
trajectory. After an interruption the same command continues; it also replaces damaged files.
"""

from dataclasses import dataclass, field

from cdit.codec.config import CodecConfig
from cdit.common.cli import parse_config, run
from cdit.common.errors import UserError
from cdit.common.limits import Positive
from cdit.data.config import DataConfig, Precision


@dataclass
class EncodeConfig:
    """What to encode."""

    data: DataConfig = field(default_factory=DataConfig)
    """The dataset or mix; only image_size, crop and workers are used; the other fields describe windows."""
    codec: CodecConfig = field(default_factory=CodecConfig)
    """The codec."""
    split: str | None = None
    """Splits to encode, separated by commas; by default all that the dataset lists."""
    precision: Precision = "float16"
    """Type of the stored numbers."""
    batch_size: Positive[int] = 16
    """Frames encoded at once."""
    verify: bool = False
    """Only verify the checksums of existing files, and name every file that is missing or damaged."""


def main() -> None:
    """The command line."""
    config = parse_config(EncodeConfig, __doc__, sections=("data", "codec"))
    config.data.validate()
    if not config.verify and config.codec.kind == "pixels":
        raise UserError("codec.kind is pixels, which are not encoded: expected kl, tiny or features")

    from cdit.data.encoder import encode, verify  # imports torch

    if config.verify:
        verify(config)
    else:
        encode(config)


if __name__ == "__main__":
    run(main)
