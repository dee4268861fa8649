"""The dataset of walks, the tiny world model, and what lets tests import the maps of `rooms`."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "doom")]
from tiny_world import checkpoint, dataset, walks, world  # noqa: F401
