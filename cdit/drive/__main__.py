"""Drive a world model in the browser: `python -m cdit.drive`, then open the address that it prints.

    python -m cdit.drive
    python -m cdit.drive --checkpoint runs/quickstart --data data/doom/quickstart --record data/drives
    python -m cdit.drive --also "[runs/other]"

Shows the dream and, if the start frames were recorded in Doom, the ground truth beside it; what attention heads attend
to; how samples from different noise differ; plans to a goal picture; and two checkpoints or samplers side by side.
Listens on this machine only; with another --host, the printed address contains a token that every page needs.
"""

from cdit.common.cli import parse_config, run
from cdit.drive.config import DriveConfig


def main() -> None:
    """The command line."""
    config = parse_config(DriveConfig, __doc__)
    config.check()

    from cdit.drive.server import serve  # imports torch

    serve(config)


if __name__ == "__main__":
    run(main)
