"""The datasets of a config: their trajectories in one list, and what they have in common."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cdit.common.errors import DataError
from cdit.data.action_space import ActionSpace
from cdit.data.config import Source, StoredDataset
from cdit.data.layout import Camera
from cdit.data.lerobot import split_ranges  # which also registers its source
from cdit.data.shard_cache import ShardCache
from cdit.data.shards import Shards, ShardSource, is_sharded
from cdit.data.source import SOURCES, DatasetSource, Opened, TrajectorySource, register_source
from cdit.data.trajectory import FolderSource
from cdit.data.video import VideoSource  # noqa: F401 (registers itself)


@register_source("auto")
class AutoSource(DatasetSource):
    """Shards if there are any, otherwise folders of frames."""

    @staticmethod
    def open(folder: str, split: str, **options: Any) -> Opened:
        """See `DatasetSource.open`."""
        return (ShardSource if is_sharded(folder) else FolderSource).open(folder, split, **options)


@dataclass(frozen=True)
class WindowInfo:
    """What all windows have in common."""

    fps: float
    spacing: float | None
    """Metres between consecutive frames, the unit of normalised actions; None if the datasets differ."""
    has_spacing: bool
    """Whether the datasets or the config give it; otherwise it is 1."""
    recorded_fps: float
    """Frames per second of the first dataset, before the config's."""
    has_actions: bool
    """Whether any dataset has actions."""
    actions: ActionSpace
    """What they are."""
    camera: Camera | None
    """The camera of the recorded frames (before crop and resize), if it is known and the same for all."""


def listed_splits(source: StoredDataset) -> list[str]:
    """The splits that a dataset lists. Without lists, train, and test for videos and LeRobot."""
    if is_sharded(source.folder):
        return list(Shards(source.folder).splits)
    lists = Path(source.splits or Path(source.folder, "splits")).glob("*/traj_names.txt")
    if listed := sorted(path.parent.name for path in lists):
        return listed
    if source.source == "lerobot" and (ranges := split_ranges(Path(source.folder))):
        return list(ranges)
    return ["train", *(["test"] if source.source in ("video", "lerobot") else [])]


def open_source(source: StoredDataset, split: str, cache: ShardCache | None = None, may_lack: bool = False) -> Opened:
    """Opens a split of one dataset of a config, see `DatasetSource.open`.

    Raises:
        UserError: there is no such source, or the dataset has problems, which the message lists.
    """
    return SOURCES.load(source.source).open(
        source.folder,
        split,
        splits=source.splits,
        follow_links=source.follow_links,
        fps=source.fps,
        camera=source.camera,
        action_key=source.action_key,
        action_kind=source.action_kind,
        may_lack=may_lack,
        cache=cache,
    )


def read_sources(
    sources: Sequence[Source], split: str, min_frames: int, cache: ShardCache, may_lack: bool = False
) -> tuple[list[TrajectorySource], list[float], WindowInfo]:
    """The trajectories of a split that have at least `min_frames`, dataset after dataset.

    Reports on stderr how many are shorter. Further arguments are those of `DatasetSource.open`.

    Returns:
        The trajectories; for each the spacing of its dataset in metres; and what all have in common.

    Raises:
        DataError: a dataset has problems, which the message lists, or they are not compatible.
    """
    trajectories, spacings, infos = [], [], []
    for source in sources:
        found, info = _read(source, split, min_frames, cache, may_lack)
        trajectories += found
        spacings += [info.spacing] * len(found)
        infos.append(info)
    return trajectories, spacings, _merge(infos, sources)


def _read(
    source: Source, split: str, min_frames: int, cache: ShardCache, may_lack: bool
) -> tuple[list[TrajectorySource], WindowInfo]:
    trajectories, info = open_source(source, split, cache, may_lack)
    long_enough = [trajectory for trajectory in trajectories if len(trajectory) >= min_frames]
    if not long_enough:
        longest = max(map(len, trajectories), default=0)
        raise DataError(
            f"{source.folder}: no trajectory of split {split!r} is long enough for a window, which takes {min_frames} "
            f"frames; the longest has {longest}"
        )
    if len(long_enough) < len(trajectories):
        tqdm.write(
            f"{source.folder}: {len(trajectories) - len(long_enough)} of {len(trajectories)} trajectories of split "
            f"{split!r} have fewer than {min_frames} frames and are left out",
            file=sys.stderr,
        )
    return long_enough, WindowInfo(
        fps=source.fps or info.fps,
        spacing=source.spacing or info.metric_waypoint_spacing or 1.0,
        has_spacing=bool(source.spacing or info.metric_waypoint_spacing),
        recorded_fps=info.fps,
        has_actions=info.actions.recorded(trajectories[0]),
        actions=info.actions,
        camera=info.camera,
    )


def _merge(infos: Sequence[WindowInfo], sources: Sequence[Source]) -> WindowInfo:
    """What the windows of all sources have in common.

    Raises:
        DataError: their frame rates differ, so that past frames would mean different times.
    """
    rates = {source.folder: info.fps for source, info in zip(sources, infos, strict=True)}
    if len(set(rates.values())) > 1:
        listed = ", ".join(f"{folder} {fps:g}" for folder, fps in rates.items())
        raise DataError(f"data.mix: expected datasets of the same frame rate, not {listed}")
    spaces = [info.actions for info in infos if info.has_actions] or [infos[0].actions]
    if any(space != spaces[0] for space in spaces):
        raise DataError(
            "data.mix: expected datasets with the same names, units, ranges and kind of actions, not "
            + "; ".join(f"{space.kind} {', '.join(space.names)}" for space in spaces)
        )
    spacings = {info.spacing for info in infos if info.has_actions} or {1.0}
    cameras = [info.camera for info in infos]
    return WindowInfo(
        fps=infos[0].fps,
        spacing=spacings.pop() if len(spacings) == 1 else None,
        has_spacing=all(info.has_spacing for info in infos),
        recorded_fps=infos[0].recorded_fps,
        actions=spaces[0],
        has_actions=any(info.has_actions for info in infos),
        camera=cameras[0] if all(camera == cameras[0] for camera in cameras) else None,
    )
