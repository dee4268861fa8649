"""Reads trajectories and splits from folders (see `cdit.data.layout`) and lists all their problems."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cdit.common.errors import DataError
from cdit.common.files import check_inside, check_name, read_text
from cdit.data import safe_pickle
from cdit.data.layout import DESCRIPTION, LATENTS, POSES, TEXT, DatasetInfo, split_file
from cdit.data.source import DatasetSource, Opened, register_source

if TYPE_CHECKING:
    from torch import Tensor

MAX_POSE = 1e9
"""Largest coordinate (metres) and yaw (radians), so that differences and squares are finite in float32."""
LISTED_PROBLEMS = 20
FRAME_FILE = re.compile(r"(\d+)\.(?:jpe?g|png)", re.IGNORECASE)


@dataclass(frozen=True)
class Trajectory:
    """A `TrajectorySource` whose frames are files in a folder of its own."""

    name: str
    folder: Path
    files: np.ndarray
    """(T,) file names of the frames, in time order."""
    position: np.ndarray | None
    yaw: np.ndarray | None
    conditions: Mapping[str, np.ndarray] = field(default_factory=dict)
    texts: Sequence[str] = ()
    actions = shard = None

    def __len__(self) -> int:
        return len(self.files)

    @property
    def dataset(self) -> Path:
        """The dataset's folder."""
        return self.folder.parents[len(Path(self.name).parts) - 1]

    def frame(self, time: int) -> Path:
        """The file of the frame at `time` (0…T-1)."""
        return self.folder / str(self.files[time])

    def frames(self, times: Sequence[int]) -> "Tensor":
        """Frames (N, 3, H, W) uint8."""
        from cdit.data.frames import decode, stack  # imports torch

        return stack([decode(self.frame(time)) for time in times], self.folder)


def read_names(folder: Path | str, split: str, split_folder: Path | str | None = None) -> list[str]:
    """The trajectory names of a split.

    Raises:
        DataError: the list is missing, unreadable or empty, or a name points outside the dataset.
    """
    listing = split_file(Path(folder), split) if split_folder is None else Path(split_folder, split, "traj_names.txt")
    try:
        names = [line.strip() for line in read_text(listing).splitlines() if line.strip()]
    except DataError as error:
        raise DataError(f"split {split!r} cannot be read: {error}") from error
    if not names:
        raise DataError(f"{listing}: split {split!r} is empty")
    for name in names:
        check_name(name, listing)
    return names


def read_split(
    folder: Path | str,
    split: str,
    split_folder: Path | str | None = None,
    min_frames: int = 2,
    follow_links: bool = False,
    may_lack: bool = False,
) -> tuple[list[Trajectory], list[str]]:
    """Reads the trajectories of a split; frames are listed, not decoded.

    Args:
        split_folder: the folder of `<split>/traj_names.txt`; by default `<folder>/splits`.
        follow_links: whether links may point outside the dataset's folder; such links are otherwise reported as
            problems.
        may_lack: whether frames may be missing if the poses give the number of frames; reading a missing frame then
            fails.

    Returns:
        The trajectories without problems, in the order of the split file; and the problems, one line each. Without a
        `dataset.json`, every trajectory needs poses if one has a `traj_data.pkl`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return [], [f"{folder}: no such dataset folder"]
    problems = []
    info = None
    try:
        if not follow_links:
            for path in (folder / DESCRIPTION, split_file(folder, split), folder / LATENTS):
                check_inside(path, folder)
        info = DatasetInfo.load(folder)
    except DataError as error:
        problems.append(str(error))
    try:
        names = read_names(folder, split, split_folder)
    except DataError as error:
        return [], [*problems, str(error)]
    problems += [
        f"{folder}: split {split!r} lists {name} {count} times" for name, count in Counter(names).items() if count > 1
    ]
    has_poses = any((folder / name / POSES).is_file() for name in names) if info is None else info.has_actions
    trajectories = []
    for name in dict.fromkeys(names):
        if not (folder / name).is_dir():
            problems.append(f"{folder / name}: listed in split {split!r}, but there is no such folder")
            continue
        if not follow_links and (leading_out := _links_out(folder / name, folder)):
            problems.append(leading_out)
            continue
        trajectory, found = _read_trajectory(folder / name, name, has_poses, min_frames, may_lack)
        problems += found
        if trajectory is not None:
            trajectories.append(trajectory)
    return trajectories, problems


def _links_out(trajectory: Path, dataset: Path) -> str | None:
    """The problem of a trajectory with a link that points outside the dataset."""
    try:
        check_inside(trajectory, dataset)
        with os.scandir(trajectory) as entries:
            for entry in entries:
                if entry.is_symlink():
                    check_inside(Path(entry.path), dataset)
    except DataError as error:
        return str(error)
    return None


def _read_trajectory(
    folder: Path, name: str, has_poses: bool, min_frames: int, may_lack: bool
) -> tuple[Trajectory | None, list[str]]:
    files, problems = _frame_files(folder)
    length = max(files, default=-1) + 1  # may be huge: file names can contain any number
    pose_problems = []
    position = yaw = None
    conditions: dict[str, np.ndarray] = {}
    if has_poses:
        try:
            position, yaw, conditions = read_poses(folder / POSES)
        except DataError as error:
            pose_problems.append(str(error))
        else:
            if may_lack and files:
                length = max(length, len(position))
            if len(position) != length:
                pose_problems.append(f"{folder}: {length} frames, but {len(position)} poses in {POSES}")
    text = ""
    try:
        text = read_caption(folder / TEXT)
    except DataError as error:
        problems.append(str(error))
    missing = length - len(files)
    if missing and not (may_lack and position is not None):
        first = next(time for time in range(length) if time not in files)
        problems.append(f"{folder}: {missing} of {length} frames missing, the first is frame {first}")
    if length < min_frames:
        problems.append(f"{folder}: {length} frames, too few for a window, which takes {min_frames}")
    if problems or pose_problems:
        return None, problems + pose_problems
    kind = Path(next(iter(files.values()))).suffix
    names = np.array([files.get(time, f"{time}{kind}") for time in range(length)])
    return Trajectory(name, folder, names, position, yaw, conditions, [text] * length), []


def _frame_files(folder: Path) -> tuple[dict[int, str], list[str]]:
    """The files of the frames by number, and the problems."""
    found: dict[int, str] = {}
    problems = []
    for file in sorted(os.listdir(folder)):
        if match := FRAME_FILE.fullmatch(file):
            time = int(match[1])
            if time in found:
                problems.append(f"{folder}: frame {time} exists twice, as {found[time]} and {file}")
            found[time] = file
    return found, problems


def read_caption(path: Path) -> str:
    """The content of a text file; empty without a file."""
    return read_text(path).strip() if path.is_file() else ""


def read_poses(path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """The position (T, 2), yaw (T,) and further conditions (T, …) in a `traj_data.pkl`, see `checked_poses`."""
    return checked_poses(safe_pickle.load(path), path)


def checked_poses(poses: Any, path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Position (T, 2) and yaw (T,) in float64, and the other arrays of numbers with T rows, by name.

    Raises:
        DataError: `poses` is not a dict with arrays of such shapes, or they are not finite or beyond `MAX_POSE`.
    """
    if not isinstance(poses, dict) or not {"position", "yaw"} <= poses.keys():
        raise DataError(f"{path}: expected a dict with 'position' and 'yaw'")
    arrays = {name: x for name, x in poses.items() if isinstance(x, np.ndarray) and x.dtype.kind in "biuf" and x.ndim}
    if not {"position", "yaw"} <= arrays.keys():
        raise DataError(f"{path}: position and yaw are not arrays of numbers")
    with np.errstate(over="ignore"):  # numbers beyond float64 become infinite
        position, yaw = (np.asarray(arrays.pop(name), np.float64) for name in ("position", "yaw"))
    length = len(position)
    if position.shape != (length, 2) or yaw.shape not in ((length,), (length, 1)):
        raise DataError(f"{path}: expected position (T, 2) and yaw (T,), not {position.shape} and {yaw.shape}")
    yaw = yaw.reshape(length)
    broken = np.flatnonzero(~(np.maximum(np.abs(position).max(axis=1, initial=0), np.abs(yaw)) <= MAX_POSE))
    if len(broken):
        raise DataError(
            f"{path}: {len(broken)} poses are not finite, or beyond {MAX_POSE:g} metres or radians, the first at frame "
            f"{broken[0]}"
        )
    return (
        position,
        yaw,
        {name: np.asarray(x) for name, x in arrays.items() if isinstance(name, str) and len(x) == length},
    )


@register_source("folder")
class FolderSource(DatasetSource):
    """Frame files in a folder for each trajectory (see `cdit.data.layout`)."""

    @staticmethod
    def open(
        folder: str,
        split: str,
        *,
        splits: str | None = None,
        follow_links: bool = False,
        may_lack: bool = False,
        **_: Any,
    ) -> Opened:
        """See `DatasetSource.open`."""
        trajectories, problems = read_split(folder, split, splits, follow_links=follow_links, may_lack=may_lack)
        if problems:
            raise listed_problems(folder, split, problems)
        return trajectories, DatasetInfo.load(Path(folder)) or DatasetInfo(name=folder)


def listed_problems(folder: str, split: str, problems: Sequence[str]) -> DataError:
    """An error that lists the first problems of a split."""
    lines = list(problems[:LISTED_PROBLEMS])
    if len(problems) > len(lines):
        lines.append(f"… and {len(problems) - len(lines)} more: python -m cdit.data.check {folder}")
    return DataError(f"{folder}: split {split!r} cannot be used\n  " + "\n  ".join(lines))
