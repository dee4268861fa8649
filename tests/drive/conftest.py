"""The dataset of walks, the tiny world model, and what is driven in it."""

import sys
from pathlib import Path

import pytest

from cdit.drive.config import DriveConfig
from cdit.drive.drive import Stage
from cdit.plan.config import OptimizerConfig, PlannerConfig

sys.path.append(str(Path(__file__).parents[1]))
from tiny_world import checkpoint, dataset, walks, world  # noqa: F401


@pytest.fixture(scope="session")
def stage(checkpoint: Path, walks: Path) -> Stage:  # noqa: F811
    """The tiny world, starting from the walks."""
    planner = PlannerConfig(cost="pixels", frames=[2, 4], optimizer=OptimizerConfig(samples=8, iterations=2, elites=4))
    return Stage(DriveConfig(checkpoint=str(checkpoint), data=str(walks), planner=planner))
