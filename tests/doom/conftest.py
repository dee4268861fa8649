"""The maze, and what lets the tests beside it import `rooms`, which they share."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdit.doom.engine import Engine
from cdit.doom.geometry import MapGeometry

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def maze() -> Iterator[Engine]:
    """The maze, with frames of 96 pixels."""
    pytest.importorskip("vizdoom", reason="the engine is part of the extra 'doom'")
    with Engine("my_way_home", 96) as engine:
        yield engine


@pytest.fixture(scope="module")
def maze_geometry(maze: Engine) -> MapGeometry:
    return MapGeometry.of(maze)
