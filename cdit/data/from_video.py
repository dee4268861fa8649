"""Makes a dataset without actions from video; models trained on it are conditioned on the time shift alone.

    python -m cdit.data.from_video VIDEO… --out FOLDER

Samples each video at a fixed rate and cuts it into trajectories. The last videos, or the last part of a single video,
become the test split. After an interruption, the same command keeps the trajectories that are complete.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Annotated

import av
import numpy as np
from tqdm import tqdm

from cdit.common.cli import parse_config, run
from cdit.common.errors import DataError, UserError
from cdit.common.files import check_name
from cdit.common.limits import Between, Positive, check_limits, within
from cdit.data.layout import DatasetInfo, split_file, write_split, write_trajectory
from cdit.data.video import duration, frame_time, open_video, rounding, video_errors

LONGEST_GAP = 60
"""Most seconds from one frame to the next; each second is written as `fps` images."""
MIN_FRAMES = 16
"""Minimum length of a trajectory; a shorter rest at the end of a video is left out."""


@dataclass
class VideoOptions:
    """How videos become trajectories."""

    fps: Positive[float] = 4.0
    """Frames per second to sample."""
    size: Positive[int] = 256
    """Shorter side of the frames in pixels; smaller videos keep their size."""
    quality: Annotated[int, within(1, 100)] = 95
    """JPEG quality, 1 to 100."""
    segment_seconds: float = 60.0
    """Longest trajectory, in seconds."""
    test_fraction: Between = 0.1
    """Share of the videos, or of the duration of a single video, that becomes the test split."""

    @property
    def segment_frames(self) -> int:
        """Longest trajectory in frames."""
        return int(self.segment_seconds * self.fps)

    def validate(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is out of its range; the message names the option.
        """
        check_limits(self, "--")
        if self.segment_frames < MIN_FRAMES:
            raise UserError(f"--segment_seconds is {self.segment_seconds}, expected at least {MIN_FRAMES} frames")


@dataclass(kw_only=True)
class VideoConfig(VideoOptions):
    """What to make."""

    videos: list[str]
    """Video files."""
    out: str
    """The dataset folder to make."""


def convert(videos: Sequence[Path], out: Path, options: VideoOptions) -> dict[str, list[str]]:
    """Writes the dataset.

    Args:
        videos: the video files, of `FORMATS`; their names without suffix must differ.
        out: the dataset folder; what an interrupted run with the same videos and options left there is kept.
        options: how videos become trajectories.

    Returns:
        The trajectory names of the splits "train" and "test".

    Raises:
        UserError: an option is out of range, or `out` holds another dataset.
        DataError: videos cannot be read, are slower than `options.fps` or too short; all such videos are listed.
    """
    options.validate()
    frame_counts = _frame_counts(videos, options)
    source = {"recipe": "cdit.data.from_video", "videos": [video.name for video in videos], **asdict(options)}
    info = DatasetInfo(out.name, options.fps, has_actions=False, source=source)
    if DatasetInfo.load(out) not in (None, info):
        raise UserError(f"{out}: holds a dataset made from other videos or options; remove it or choose another --out")
    info.save(out)
    names: dict[str, list[str]] = {"train": [], "test": []}
    first_test = len(videos) - max(1, round(len(videos) * options.test_fraction))
    for i, (video, count) in enumerate(zip(videos, frame_counts, strict=True)):
        if len(videos) == 1:
            cut = count - max(MIN_FRAMES, round(count * options.test_fraction))
        else:
            cut = math.inf if i < first_test else 0
        for name, start in _convert_video(video, out, options, count, cut):
            names["train" if start < cut else "test"].append(name)
    for split, split_names in names.items():
        if not split_names:
            raise DataError(f"{videos[-1]}: ends before its stated duration; too short for the {split} split")
        write_split(out, split, split_names)
    return names


def _frame_counts(videos: Sequence[Path], options: VideoOptions) -> list[int]:
    """Number of frames of each video, from its stated duration."""
    problems = [f"{name}: {n} videos of this name" for name, n in Counter(v.stem for v in videos).items() if n > 1]
    least = MIN_FRAMES * (2 if len(videos) == 1 else 1)
    counts = []
    for video in videos:
        try:
            check_name(video.stem, video)
            with video_errors(video), open_video(video) as container:
                stream = container.streams.video[0]
                seconds = duration(container, video)
                if stream.average_rate is not None and stream.average_rate < options.fps:
                    rate = float(stream.average_rate)
                    raise DataError(f"{video}: {rate:g} frames per second, fewer than --fps {options.fps:g}")
            counts.append(int(seconds * options.fps))
            if counts[-1] < least:
                raise DataError(f"{video}: too short, {counts[-1]} frames at --fps {options.fps:g}, expected {least}")
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n  ".join(["videos cannot be used", *problems]))
    return counts


def _convert_video(video: Path, out: Path, options: VideoOptions, count: int, cut: float) -> list[tuple[str, int]]:
    """Writes the missing trajectories of a video of about `count` frames; one always starts at frame `cut`.

    Returns:
        (name, first frame) of each trajectory, in time order.
    """
    made: list[tuple[str, int]] = []
    start = 0
    with tqdm(_sample(video, Fraction(options.fps)), total=count, desc=video.name, unit="frame") as bar:
        frames = iter(bar)
        while True:
            length = options.segment_frames
            if start < cut:
                length = min(length, cut - start)
            name = f"{video.stem}_{len(made):04d}"
            part = islice(frames, length)
            if (out / name).is_dir():
                taken = sum(1 for _ in part)
            else:
                images = [_image(frame, options.size) for frame in part]
                taken = len(images)
                if taken >= MIN_FRAMES:
                    write_trajectory(out, name, np.stack(images), quality=options.quality)
            if taken >= MIN_FRAMES:
                made.append((name, start))
            start += taken
            if taken < length:
                return made


def _sample(video: Path, fps: Fraction) -> Iterator[av.VideoFrame]:
    """The frames that the video shows at 0, 1/fps, 2/fps, … seconds from its first frame."""
    taken = 0
    try:
        with open_video(video) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            shown, tolerance = None, rounding(stream)
            for frame in container.decode(stream):
                time = frame_time(frame, video)
                if shown is None:
                    start = last = time
                if abs(time - last) > LONGEST_GAP:
                    raise DataError(f"{video}: {float(abs(time - last)):.4g} s from one frame to the next")
                last = time
                while start + taken / fps < time - tolerance:
                    yield shown
                    taken += 1
                shown = frame
            if shown is not None and abs(start + taken / fps - time) <= tolerance:
                yield shown
    except av.error.FFmpegError as error:
        raise DataError(f"{video}: cannot be decoded beyond {taken / float(fps):.1f} s ({error})") from error


def _image(frame: av.VideoFrame, size: int) -> np.ndarray:
    """The frame upright, (H, W, 3) uint8 RGB, its shorter side at most `size`."""
    scale = min(1.0, size / min(frame.width, frame.height))
    width, height = round(frame.width * scale), round(frame.height * scale)
    image = frame.reformat(width, height, "rgb24", interpolation="AREA").to_ndarray()
    return np.rot90(image, frame.rotation // 90)


def main() -> None:
    """The command line."""
    options = parse_config(VideoConfig, __doc__, listed="videos")
    videos, out = [Path(video) for video in options.videos], Path(options.out)
    options.validate()
    if all(split_file(out, split).is_file() for split in ("train", "test")):
        raise UserError(f"{out}: holds a finished dataset; remove it or choose another --out")
    values = {f.name: getattr(options, f.name) for f in fields(VideoOptions)}
    found = convert(videos, out, VideoOptions(**values))
    print(f"{out}: {len(found['train'])} trajectories for training, {len(found['test'])} for testing")


if __name__ == "__main__":
    run(main)
