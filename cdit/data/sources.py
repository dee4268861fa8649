"""Datasets that are trained on together: their trajectories in one list, and what they have in common."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from cdit.common.errors import DataError
from cdit.data.config import Source
from cdit.data.layout import Camera, DatasetInfo
from cdit.data.shard_cache import ShardCache
from cdit.data.shards import Shards, ShardTrajectory, is_sharded
from cdit.data.trajectory import Trajectory, read_split

LISTED_PROBLEMS = 20


@dataclass(frozen=True)
class WindowInfo:
    """What all windows of a dataset have in common."""

    fps: float
    """Frames a second."""
    spacing: float | None
    """Metres between consecutive frames, the unit of normalised actions; None for a mix of different ones."""
    has_actions: bool
    """Whether poses, and so actions, are known, of any trajectory."""
    camera: Camera | None
    """The camera of the recorded frames (before crop and resize), where it is known and the same for all."""


def read_sources(
    sources: Sequence[Source], split: str, min_frames: int, cache: ShardCache, may_lack: bool = False
) -> tuple[list[Trajectory | ShardTrajectory], list[float], WindowInfo]:
    """The trajectories of a split that have at least `min_frames`, dataset after dataset; says how many have not.

    With `may_lack`, frames may be missing from a folder where poses say how many there are.

    Returns:
        The trajectories; the spacing of each one's dataset in metres; and what all have in common.

    Raises:
        DataError: a dataset has problems, which the message lists, or they do not go together.
    """
    trajectories, spacings, infos = [], [], []
    for source in sources:
        found, info = _read(source, split, min_frames, cache, may_lack)
        trajectories += found
        spacings += [info.spacing] * len(found)
        infos.append(info)
    return trajectories, spacings, _merge(infos, sources)


def read_trajectories(source: Source, split: str, may_lack: bool = False) -> list[Trajectory]:
    """All trajectories of a split of one dataset in a folder; `may_lack` as of `read_split`.

    Raises:
        DataError: it has problems, which the message lists.
    """
    if is_sharded(source.folder):
        raise DataError(f"{source.folder}: holds shards; expected the dataset's folder that they were made of")
    trajectories, problems = read_split(
        source.folder, split, source.splits, follow_links=source.follow_links, may_lack=may_lack
    )
    if problems:
        lines = problems[:LISTED_PROBLEMS]
        if len(problems) > len(lines):
            lines.append(f"… and {len(problems) - len(lines)} more: python -m cdit.data.check {source.folder}")
        raise DataError(f"{source.folder}: split {split!r} cannot be used\n  " + "\n  ".join(lines))
    return trajectories


def _read(
    source: Source, split: str, min_frames: int, cache: ShardCache, may_lack: bool
) -> tuple[list[Trajectory | ShardTrajectory], WindowInfo]:
    """The trajectories of a dataset that are long enough for a window; says on stderr how many are not."""
    if is_sharded(source.folder):
        shards = Shards(source.folder, cache)
        trajectories, info = shards.trajectories(split), shards.info
    else:
        trajectories = read_trajectories(source, split, may_lack)
        info = DatasetInfo.load(source.folder) or DatasetInfo(name=source.folder)
    long_enough = [trajectory for trajectory in trajectories if len(trajectory) >= min_frames]
    if not long_enough:
        longest = max(map(len, trajectories))
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
        has_actions=trajectories[0].position is not None,
        camera=info.camera,
    )


def _merge(infos: Sequence[WindowInfo], sources: Sequence[Source]) -> WindowInfo:
    """What the windows of all sources have in common.

    Raises:
        DataError: frames a second differ, so that the past frames would not mean the same.
    """
    rates = {source.folder: info.fps for source, info in zip(sources, infos, strict=True)}
    if len(set(rates.values())) > 1:
        listed = ", ".join(f"{folder} {fps:g}" for folder, fps in rates.items())
        raise DataError(f"data.mix: expected datasets of the same number of frames a second, not {listed}")
    spacings = {info.spacing for info in infos if info.has_actions} or {1.0}
    cameras = [info.camera for info in infos]
    return WindowInfo(
        fps=infos[0].fps,
        spacing=spacings.pop() if len(spacings) == 1 else None,
        has_actions=any(info.has_actions for info in infos),
        camera=cameras[0] if all(camera == cameras[0] for camera in cameras) else None,
    )
