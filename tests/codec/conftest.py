"""The dataset of walks and the tiny world model."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from tiny_world import walks, world  # noqa: F401
