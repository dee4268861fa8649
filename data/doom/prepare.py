"""Records first-person walks through Doom maps with ViZDoom, as a dataset for world models.

    python data/doom/prepare.py                                    # quickstart: about a minute on two cores
    python data/doom/prepare.py --config data/doom/freedoom.yaml   # all maps of Freedoom
    python data/doom/prepare.py --out data/doom/mine --maps freedoom1/E1M2,freedoom2/MAP07 --frames 5000 --size 128

Options that are not given come from --config, or from the quickstart without it; this holds for --unknown_maps too, and
a map cannot be both trained on and unknown.

Records without monsters, HUD, weapon and damage, at 4 frames per second and walking speed. The same options give the
same bytes for any number of workers. After an interruption, the same command continues.
"""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from cdit.common.cli import exit_on_sigterm, parse_config, run
from cdit.common.errors import UserError
from cdit.data.layout import DatasetInfo
from cdit.doom.dataset import RECORDER_VERSION, WAYPOINT_SPACING, Job, record_dataset
from cdit.doom.engine import FPS, RENDER_HEIGHT, camera, engine_version
from cdit.doom.maps import find_maps


@dataclass
class Config:
    """What to record."""

    out: Path = Path("data/doom/quickstart")
    """Folder of the dataset."""
    maps: list[str] | str = "my_way_home"
    """Maps of the splits train and test, separated by commas; freedoom1 and freedoom2 stand for all maps of a game but
    the unknown ones."""
    frames: int = 28_000
    """Largest number of frames per map of train and test together, rounded up to whole trajectories."""
    test_share: float = 0.1
    """Share of the trajectories of each map that become the test split."""
    unknown_maps: list[str] | str = field(default_factory=list)
    """Maps of the split unknown, which are never trained on."""
    unknown_frames: int = 1000
    """Largest number of frames per map of the split unknown, rounded up to whole trajectories."""
    length: int = 256
    """Largest number of frames of a trajectory; teleports and exits end some earlier."""
    min_length: int = 64
    """Shorter walks are discarded and recorded again from another place."""
    size: int = 128
    """Width and height of the frames in pixels."""
    depth: bool = False
    """Also store depth, in metres, as depth.npz of (T, size, size) float16 for each trajectory."""
    seed: int = 0
    """Seed of all randomness."""
    workers: int = os.cpu_count() or 1
    """Processes that record; they do not influence the result."""


def main() -> None:
    """Records the dataset that the command line describes."""
    quickstart = Path(__file__).with_name("quickstart.yaml")
    config = parse_config(Config, __doc__, default_file=quickstart)
    check(config)
    exit_on_sigterm()
    unknown = find_maps(config.unknown_maps)
    maps = [name for name in find_maps(config.maps) if name not in unknown]
    if not maps:
        raise UserError("maps: all of them are also unknown_maps; none is left to train on")
    jobs = [job for name in maps for job in jobs_of(config, name, config.frames, "train", "test")]
    jobs += [job for name in unknown for job in jobs_of(config, name, config.unknown_frames, "unknown", "unknown")]
    info = DatasetInfo(
        name=config.out.name,
        fps=FPS,
        metric_waypoint_spacing=WAYPOINT_SPACING,
        camera=camera(config.size),
        source={
            "recipe": "data/doom/prepare.py",
            "recorder": RECORDER_VERSION,
            "maps": maps,
            "unknown_maps": unknown,
            **{key: getattr(config, key) for key in RECORDED},
            "vizdoom": engine_version(),
        },
    )
    record_dataset(config.out, info, jobs, config.workers)


RECORDED = ("frames", "unknown_frames", "test_share", "length", "min_length", "size", "depth", "seed")
"""The options, besides the maps, that the frames depend on."""


def jobs_of(config: Config, map_name: str, frames: int, split: str, last_split: str) -> list[Job]:
    """The trajectories of one map; the last `config.test_share` of them go to `last_split`."""
    count = math.ceil(frames / config.length)
    last = math.ceil(count * config.test_share)
    return [
        Job(
            map_name,
            number,
            split=last_split if number >= count - last else split,
            length=config.length,
            min_length=config.min_length,
            size=config.size,
            seed=config.seed,
            depth=config.depth,
        )
        for number in range(count)
    ]


def as_list(maps: list[str] | str) -> list[str]:
    """The names as given, in either format."""
    return maps.split(",") if isinstance(maps, str) else maps


def named_maps(maps: list[str] | str) -> set[str]:
    """The maps named individually, not by their game."""
    return {name for name in as_list(maps) if find_maps([name]) == [name]}


def check(config: Config) -> None:
    """Checks the values.

    Raises:
        UserError: names the field.
    """
    for name in ("frames", "unknown_frames", "min_length", "workers"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be at least 1, not {getattr(config, name)}")
    both = named_maps(config.maps) & set(find_maps(config.unknown_maps))
    if both:
        raise UserError(
            f"maps names {', '.join(sorted(both))}, and so does unknown_maps "
            f"({', '.join(as_list(config.unknown_maps))}; "
            "given or by default): a map is either trained on or unknown"
        )
    if config.seed < 0:
        raise UserError(f"seed must not be negative, not {config.seed}")
    if config.length < config.min_length:
        raise UserError(f"length must be at least min_length ({config.min_length}), not {config.length}")
    if not 16 <= config.size <= RENDER_HEIGHT:
        raise UserError(f"size must be between 16 and {RENDER_HEIGHT}, not {config.size}")
    if not 0 < config.test_share < 1:
        raise UserError(f"test_share must be between 0 and 1, not {config.test_share}")
    walks = math.ceil(config.frames / config.length)
    if math.ceil(walks * config.test_share) == walks:
        raise UserError(
            f"frames is {config.frames}, which makes {walks} of length {config.length} per map, and test_share leaves "
            "none to train on: expected more frames or a smaller length"
        )


if __name__ == "__main__":
    run(main)
