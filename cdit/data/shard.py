"""Packs a dataset into shards, to train from a remote store or on more data than fits on a disk, and verifies them.

    python -m cdit.data.shard convert data/recon shards/recon
    python -m cdit.data.shard convert data/recon shards/recon --content latents --split train
    python -m cdit.data.shard verify shards/recon

The format is described in cdit/data/shards.py. After an interruption, `convert` continues with the next shard; a folder
is not a dataset until its last file, shards.json, is written. Splits can be added later, each with its own content.
"""

from dataclasses import dataclass
from pathlib import Path

from cdit.common.cli import Command, parse_command, run
from cdit.common.errors import DataError
from cdit.common.limits import Positive
from cdit.common.options import names
from cdit.data.config import Content, StoredDataset


@dataclass(kw_only=True)
class ConvertConfig(StoredDataset):
    """What to pack."""

    out: str
    """The folder to write to."""
    split: str | None = None
    """Splits to write, separated by commas; by default all that the dataset lists."""
    content: Content = "frames"
    """What to pack: the frames, the latents that cdit.data.encode has written, or both. Frames of other sources than
    folders are written as JPEGs."""
    shard_mb: Positive[float] = 256.0
    """Size of a shard in MB."""


@dataclass
class VerifyConfig:
    """What to verify."""

    shards: str
    """Folder or URL of the shards."""
    fast: bool = False
    """Only verify checksums; do not decode the frames."""


COMMANDS = {
    "convert": Command(ConvertConfig, "pack a dataset into shards", positional=True),
    "verify": Command(VerifyConfig, "read all shards and list all problems", positional=True),
}


def main() -> None:
    """The command line.

    Raises:
        DataError: `verify` has found problems; the message lists them all.
    """
    name, config = parse_command(COMMANDS, __doc__)

    from cdit.data.shard_writer import convert, verify  # imports torch

    if name == "convert":
        convert(config, Path(config.out), names(config.split), config.content, config.shard_mb)
        print(f"{config.out}: written; check it with python -m cdit.data.shard verify {config.out}")
        return
    problems, counts = verify(config.shards, not config.fast)
    if problems:
        raise DataError(f"{config.shards}: {len(problems)} problems\n  " + "\n  ".join(problems))
    print(f"{config.shards}: fine ({counts})")


if __name__ == "__main__":
    run(main)
