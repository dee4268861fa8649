"""Episodes of the closed loop: start and goal, drawn with a seed and stored in a file. Imports no torch."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cdit.common.cli import parser_instance
from cdit.common.errors import DataError
from cdit.common.files import read_json, write_json
from cdit.common.randomness import seed_of

VERSION = 1
WALK_IN = 4
"""Number of frames that the explorer walks before the start."""
TOLERANCE = 0.15
"""Largest relative deviation of an episode's distance from that of its stratum."""
GOAL_TURN = math.radians(45)
"""Largest angle between the heading at the goal and the direction of arrival."""
ATTEMPTS = 400
"""Starts to try, as a multiple of `count`."""
PATIENCE = 500
"""Starts to try for a stratum of which none is found."""


@dataclass(frozen=True)
class Episode:
    """A start and a goal."""

    map: str
    """Name of the map."""
    seed: int
    """Seed of the engine, and of the steps that lead to the start."""
    first: tuple[float, float, float]
    """Pose x, y, yaw of the first frame, before those steps."""
    start: tuple[float, float, float]
    """Pose after them."""
    goal: tuple[float, float, float]
    """Pose from which the goal image is taken."""
    distance: float
    """Metres from start to goal along free space."""
    stratum: float
    """The requested distance in metres."""
    visible: bool
    """Whether the goal's location is in view at the start."""

    @property
    def budget(self) -> int:
        """Largest number of steps."""
        return 40 + math.ceil(3 * self.distance / 0.3)


def save_episodes(episodes: Sequence[Episode], path: Path) -> None:
    """Writes episodes as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"version": VERSION, "episodes": [asdict(episode) for episode in episodes]})


def load_episodes(path: Path | str) -> list[Episode]:
    """Reads what `save_episodes` wrote.

    Raises:
        DataError: the file is not a list of episodes.
    """
    values = read_json(path, version=VERSION)
    try:
        return [parser_instance(Episode, values) for values in values["episodes"]]
    except Exception as error:  # jsonargparse raises many types
        raise DataError(f"{path}: not a list of episodes ({error})") from error


def draw_episodes(map_name: str, distances: Sequence[float], count: int, seed: int) -> list[Episode]:
    """Episodes of each distance, up to `count` with the goal's location in view and up to `count` without.

    Args:
        map_name: a name of `cdit.doom.maps.MAPS`.
        distances: metres along free space.
        count: episodes of each stratum.
        seed: of all draws.
    """
    from cdit.doom.engine import Engine, camera
    from cdit.doom.geometry import MapGeometry
    from cdit.plan.environment import pose_of, walk_in
    from cdit.plan.free_space import FreeSpace

    found: list[Episode] = []
    have: Counter[tuple[float, bool]] = Counter()
    random = np.random.default_rng(seed_of(seed))
    with Engine(map_name, 64) as engine:
        geometry = MapGeometry.of(engine)
        space, fov = FreeSpace(geometry), camera(64).horizontal_fov
        with tqdm(total=2 * count * len(distances), desc="episodes", unit="episode") as bar:
            for attempt in range(ATTEMPTS * count):
                strata = [(d, v) for d in distances for v in (True, False)]
                wanted = [one for one in strata if have[one] < count and (have[one] or attempt < PATIENCE)]
                if not wanted:
                    break
                first = (*map(float, geometry.random_free_point(random)), random.uniform(-math.pi, math.pi))
                episode_seed = int(random.integers(2**31))
                start = pose_of(walk_in(engine, episode_seed, np.array(first))[-1])
                away = space.distances(start[:2])
                for stratum in dict.fromkeys(d for d, _ in wanted):
                    goal = _goal(space, away, stratum, random)
                    if goal is None:
                        continue
                    visible = in_view(geometry, start, goal, fov)
                    if have[stratum, visible] >= count:
                        continue
                    have[stratum, visible] += 1
                    bar.update()
                    distance = float(away.at(goal[:2]))
                    found.append(
                        Episode(
                            map_name,
                            episode_seed,
                            first,
                            tuple(start.tolist()),
                            tuple(goal.tolist()),
                            distance,
                            stratum,
                            visible,
                        )
                    )
    return sorted(found, key=lambda e: (e.stratum, not e.visible))


def in_view(geometry, start: np.ndarray, goal: np.ndarray, fov: float) -> bool:
    """Whether a place (2 or more,) is in view of a camera at a pose (3,), and not behind a wall."""
    from cdit.doom.engine import EYE_HEIGHT
    from cdit.doom.raycast import cast, standing_height

    offset = goal[:2] - start[:2]
    angle = math.remainder(math.atan2(offset[1], offset[0]) - start[2], 2 * math.pi)
    if abs(angle) > fov / 2:
        return False
    eye = np.array([[*start[:2], standing_height(geometry, start[None, :2])[0] + EYE_HEIGHT]])
    hit = cast(geometry, eye, np.array([[*offset, 0.0]]))
    return bool(hit.distance[0] > 1)  # in units of the offset's length


def _goal(space, away, stratum: float, random: np.random.Generator) -> np.ndarray | None:
    """A pose at about that distance, with a plausible heading on arrival."""
    cells = np.argwhere(np.abs(away.grid - stratum) < TOLERANCE * stratum)
    if not len(cells):
        return None
    position = space.centre(tuple(cells[random.integers(len(cells))]))
    way = away.path(position)  # from the goal back to the start
    back = way[min(2, len(way) - 1)] - position
    yaw = math.atan2(-back[1], -back[0]) + random.uniform(-GOAL_TURN, GOAL_TURN)
    return np.array([*position, math.remainder(yaw, 2 * math.pi)])
