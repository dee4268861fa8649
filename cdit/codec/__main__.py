"""Makes codecs on the frames of a dataset: measures a backbone's features, trains an autoencoder or a decoder.

    python -m cdit.codec train --data.folder data/doom/maze --out runs/codec
    python -m cdit.codec measure --data.folder data/doom/maze --out runs/features

See docs/spaces.md.
"""

from cdit.codec.config import CodecTrainConfig, MeasureConfig
from cdit.common.cli import Command, parse_command, run

COMMANDS = {
    "train": Command(CodecTrainConfig, "train an autoencoder, or a decoder for features"),
    "measure": Command(MeasureConfig, "make a features codec from a backbone of timm"),
}


def main() -> None:
    """The command line."""
    name, config = parse_command(COMMANDS, __doc__)
    config.data.validate()

    from cdit.loading import find_device  # imports torch

    if name == "train":
        from cdit.codec.training import train_codec

        train_codec(config, find_device(config.device))
    else:
        from cdit.codec.measure import measure

        measure(config, find_device(config.device))


if __name__ == "__main__":
    run(main)
