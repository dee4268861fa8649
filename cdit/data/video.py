"""Video files as trajectories; frames are decoded on demand rather than unpacked beforehand.

    <folder>/dataset.json                      what the dataset is; optional
    <folder>/splits/<split>/traj_names.txt     names of videos without suffix; by default the last tenth is `test`
    <folder>/<name>.mp4, .avi, .mkv, .webm, …  the video
    <folder>/<name>.csv or <name>.pkl          its poses, optional; traj_data.pkl for a video in a folder of its own
    <folder>/<name>.txt                        text description of what is done; optional

Videos are sampled at the dataset's frame rate (`data.fps`, else that of dataset.json, else 4). A .csv has a header with
x, y (metres) and yaw (radians), a .pkl the dict of a traj_data.pkl: one row for each sampled frame; or rows at any
times, which are interpolated, with a further `time` in seconds from the first frame. Other columns become conditions
(see `TrajectorySource`).
"""

import csv
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np

from cdit.common.errors import DataError
from cdit.common.files import check_inside, read_text
from cdit.data.config import MAX_PIXELS
from cdit.data.layout import DESCRIPTION, POSES, DatasetInfo, split_file
from cdit.data.source import DatasetSource, Opened, register_source
from cdit.data.trajectory import checked_poses, listed_problems, read_caption, read_names, read_poses

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".ts")
FORMATS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,m4v,h264,hevc"
"""FFmpeg's names of the demuxers that are used: others, such as playlists, open further files."""
SEEK_BEYOND = 4
"""A reader seeks to times further ahead than this, in seconds, and decodes up to nearer ones."""
OPEN_VIDEOS = 4
"""Videos that a process keeps open."""


@dataclass(frozen=True)
class VideoTrajectory:
    """A `TrajectorySource` that samples a video file."""

    name: str
    path: Path
    fps: float
    """Sampled frames per second."""
    length: int
    dataset: Path
    position: np.ndarray | None = None
    yaw: np.ndarray | None = None
    conditions: Mapping[str, np.ndarray] = field(default_factory=dict)
    texts: Sequence[str] = ()
    actions = shard = None

    def __len__(self) -> int:
        return self.length

    def frames(self, times: Sequence[int]) -> "Tensor":
        """Frames (N, 3, H, W) uint8; fastest for times close together."""
        import torch

        from cdit.data.frames import stack

        reader = open_readers(os.getpid())(self.path)
        with video_errors(self.path):
            images = {time: rgb(reader.shown_at(time / Fraction(self.fps))) for time in sorted(times)}
        arrays = [torch.from_numpy(images[time]).permute(2, 0, 1) for time in times]
        return stack(arrays, self.path)


class VideoReader:
    """Finds the frames that a video shows at given times.

    Raises:
        DataError: the file is not a readable video.
    """

    def __init__(self, path: Path):
        self.path = path
        with video_errors(path):
            self._container = open_video(path)
            self._stream = self._container.streams.video[0]
            self._stream.codec_context.thread_count = 1  # threads do not survive the fork of loader workers
            self._frames = iter(self._container.decode(self._stream))
            self._shown: av.VideoFrame | None = None
            self._next = next(self._frames, None)
        if self._next is None:
            raise DataError(f"{path}: no frames")
        self.start = frame_time(self._next, path)

    def shown_at(self, seconds: Fraction) -> av.VideoFrame:
        """The frame shown at `seconds` from the first one; the last one beyond the end."""
        time = self.start + seconds + rounding(self._stream)
        shown = None if self._shown is None else frame_time(self._shown, self.path)
        if shown is None or not shown <= time <= shown + SEEK_BEYOND:
            self._seek(time)
        while self._next is not None and frame_time(self._next, self.path) <= time:
            self._shown, self._next = self._next, next(self._frames, None)
        if self._shown is None:
            raise DataError(f"{self.path}: no frame at {float(seconds):.2f} s")
        return self._shown

    def _seek(self, time: Fraction) -> None:
        for target in (time, self.start):  # a seek may end after its target in files without a good index
            self._container.seek(int(target / self._stream.time_base), stream=self._stream)
            self._frames = iter(self._container.decode(self._stream))
            self._shown, self._next = None, next(self._frames, None)
            if self._next is not None and frame_time(self._next, self.path) <= time:
                return


@cache
def open_readers(process: int) -> Callable[[Path], VideoReader]:
    """The readers of a process; a forked one must neither use nor close those of its parent."""
    return lru_cache(maxsize=OPEN_VIDEOS)(VideoReader)


def rounding(stream: "av.VideoStream") -> Fraction:
    """By how many seconds a time stamp may be early or late, because Matroska rounds them to milliseconds."""
    return min(stream.time_base, Fraction(1, 1000)) / 2


def open_video(path: Path) -> av.container.InputContainer:
    """Opens a video of one of the `FORMATS`, of at most `MAX_PIXELS` pixels.

    Raises:
        DataError: it has no video stream.
        av.error.FFmpegError: it is not a readable video.
    """
    container = av.open(str(path), options={"format_whitelist": FORMATS})
    if not container.streams.video:
        raise DataError(f"{path}: no video stream")
    for stream in container.streams.video:
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    return container


@contextmanager
def video_errors(path: Path) -> Iterator[None]:
    """Turns FFmpeg's errors into a `DataError` that names the file."""
    try:
        yield
    except av.error.FFmpegError as error:
        raise DataError(f"{path}: not a readable video ({error})") from error


def duration(container: av.container.InputContainer, path: Path) -> float:
    """Seconds, from the file's metadata.

    Raises:
        DataError: the file has none.
    """
    stream = container.streams.video[0]
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None:
        return container.duration / av.time_base
    raise DataError(f"{path}: has no duration; `ffmpeg -i {path} -c copy NEW.mp4` adds one")


def frame_time(frame: av.VideoFrame, path: Path) -> Fraction:
    """Seconds at which a frame is shown.

    Raises:
        DataError: it has no time stamp.
    """
    if frame.pts is None:
        raise DataError(f"{path}: frames have no time stamps")
    return frame.pts * frame.time_base


def rgb(frame: av.VideoFrame) -> np.ndarray:
    """A frame upright, (H, W, 3) uint8 RGB."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))


@register_source("video")
class VideoSource(DatasetSource):
    """Video files in a folder, see `cdit.data.video`."""

    @staticmethod
    def open(
        folder: str,
        split: str,
        *,
        splits: str | None = None,
        follow_links: bool = False,
        fps: float | None = None,
        **_: Any,
    ) -> Opened:
        """See `DatasetSource.open`."""
        root = Path(folder)
        if not root.is_dir():
            raise DataError(f"{folder}: no such dataset folder")
        if not follow_links:
            for path in (root / DESCRIPTION, split_file(root, split)):
                check_inside(path, root)
        info = DatasetInfo.load(root)
        names = _names(root, split, splits)
        problems = [f"{folder}: {name} is listed {count} times" for name, count in Counter(names).items() if count > 1]
        videos = {name: _video(root, name) for name in names}
        poses = {name: None if path is None else _poses_file(root, path) for name, path in videos.items()}
        has_poses = any(poses.values()) if info is None else info.has_actions
        info = replace(info or DatasetInfo(name=folder), fps=fps or (info.fps if info else DatasetInfo.fps))
        trajectories = []
        for name, path in videos.items():
            try:
                if path is None:
                    raise DataError(f"{root / name}: no video of this name ({', '.join(SUFFIXES)})")
                for file in (path, poses[name], path.with_suffix(".txt")):
                    if file is not None and not follow_links:
                        check_inside(file, root)
                with video_errors(path), open_video(path) as container:
                    trajectory = VideoTrajectory(name, path, info.fps, int(duration(container, path) * info.fps), root)
                if has_poses:
                    trajectory = _with_poses(trajectory, poses[name])
                texts = [read_caption(path.with_suffix(".txt"))] * len(trajectory)
                trajectories.append(replace(trajectory, texts=texts))
            except DataError as error:
                problems.append(str(error))
        if problems:
            raise listed_problems(folder, split, problems)
        return trajectories, info


def _names(folder: Path, split: str, splits: str | None) -> list[str]:
    if splits is not None or (folder / "splits").is_dir():
        return read_names(folder, split, splits)
    found = sorted(path.stem for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    test = max(1, len(found) // 10)
    names = {"train": found[:-test], "test": found[-test:]}.get(split)
    if not names:
        listing = split_file(folder, split)
        raise DataError(f"{folder}: no split {split!r} can be made of {len(found)} videos; list some in {listing}")
    return names


def _video(folder: Path, name: str) -> Path | None:
    paths = (folder / f"{name}{suffix}" for suffix in (*SUFFIXES, *map(str.upper, SUFFIXES)))
    return next((path for path in paths if path.is_file()), None)


def _poses_file(folder: Path, video: Path) -> Path | None:
    paths = [video.with_suffix(".csv"), video.with_suffix(".pkl")]
    if video.parent != folder:
        paths.append(video.parent / POSES)
    return next((path for path in paths if path.is_file()), None)


def _with_poses(trajectory: VideoTrajectory, path: Path | None) -> VideoTrajectory:
    """The trajectory with a pose at every sampled frame, and cut to where there are poses."""
    if path is None:
        raise DataError(f"{trajectory.path}: no poses (expected {trajectory.path.with_suffix('.csv').name}, or .pkl)")
    position, yaw, conditions = checked_poses(_read_csv(path), path) if path.suffix == ".csv" else read_poses(path)
    length, fps = len(trajectory), trajectory.fps
    time = conditions.pop("time", None)
    if time is None:
        if abs(len(position) - length) > 1:  # durations in metadata are rounded
            raise DataError(
                f"{path}: {len(position)} poses, but the video has {length} frames at {fps:g} a second; a column "
                "time, in seconds, makes them interpolated"
            )
        length = min(length, len(position))
        at = slice(length)
    else:
        starts = time.ndim == 1 and len(time) > 0 and np.isfinite(time).all() and time[0] <= 0.5 / fps
        if not (starts and (np.diff(time) > 0).all()):
            raise DataError(f"{path}: time must increase and start at 0, the video's first frame")
        length = min(length, int(time[-1] * fps) + 1)
        instants = np.arange(length) / fps
        at = np.maximum(np.searchsorted(time, instants, side="right") - 1, 0)
        position = np.stack([np.interp(instants, time, axis) for axis in position.T], axis=-1)
        yaw = np.interp(instants, time, np.unwrap(yaw))
    conditions = {name: values[at] for name, values in conditions.items()}
    return replace(trajectory, length=length, position=position[:length], yaw=yaw[:length], conditions=conditions)


def _read_csv(path: Path) -> dict[str, np.ndarray]:
    header, *rows = [row for row in csv.reader(io.StringIO(read_text(path))) if row] or [[]]
    names = [name.strip() for name in header]
    if not {"x", "y", "yaw"} <= set(names):
        raise DataError(f"{path}: expected a header with x, y and yaw, not {','.join(names)[:100]!r}")
    try:
        table = np.array(rows, np.float64).reshape(len(rows), len(names))
    except ValueError as error:
        raise DataError(f"{path}: expected {len(names)} numbers in every row ({error})") from error
    columns = dict(zip(names, table.T, strict=True))
    return {"position": np.stack([columns.pop("x"), columns.pop("y")], axis=-1), **columns}
