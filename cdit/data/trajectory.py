"""Reads trajectories and splits from disk (see `cdit.data.layout`) and says everything that is wrong with them."""

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cdit.data import safe_pickle
from cdit.data.layout import POSES, DatasetInfo, split_file
from cdit.errors import DataError

FRAME_FILE = re.compile(r"(\d+)\.(?:jpe?g|png)", re.IGNORECASE)


@dataclass(frozen=True)
class Trajectory:
    """The frames of one trajectory, and the pose at each where it is known."""

    name: str
    folder: Path
    """The trajectory's own folder."""
    files: np.ndarray
    """(T,) file names of the frames, in time order."""
    position: np.ndarray | None
    """(T, 2) float64, metres, world coordinates; None in video without poses."""
    yaw: np.ndarray | None
    """(T,) float64, radians, counter-clockwise; None in video without poses."""

    def __len__(self) -> int:
        return len(self.files)

    @property
    def dataset(self) -> Path:
        """The dataset's folder."""
        return self.folder.parents[len(Path(self.name).parts) - 1]

    def frame(self, time: int) -> Path:
        """The file of the frame at `time` (0…T-1)."""
        return self.folder / str(self.files[time])


def read_names(folder: Path | str, split: str, split_folder: Path | str | None = None) -> list[str]:
    """The trajectory names of a split as listed, without blank lines.

    Raises:
        DataError: the list is missing, unreadable or empty.
    """
    listing = split_file(Path(folder), split) if split_folder is None else Path(split_folder, split, "traj_names.txt")
    try:
        names = [line.strip() for line in listing.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{listing}: split {split!r} cannot be read ({error})") from error
    if not names:
        raise DataError(f"{listing}: split {split!r} is empty")
    return names


def read_split(
    folder: Path | str, split: str, split_folder: Path | str | None = None, min_frames: int = 2
) -> tuple[list[Trajectory], list[str]]:
    """Reads the trajectories of a split; frames are listed, not decoded.

    Args:
        folder: the dataset.
        split: name of the split.
        split_folder: what holds `<split>/traj_names.txt`, where that is not `<folder>/splits`.
        min_frames: trajectories with fewer frames are a problem.

    Returns:
        The trajectories without a problem, in the order of the split file; and the problems, one line each.
        Without a `dataset.json`, poses are expected of every trajectory if any of them has a `traj_data.pkl`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return [], [f"{folder}: no such dataset folder"]
    problems = []
    try:
        info = DatasetInfo.load(folder)
    except DataError as error:
        info = None
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
        trajectory, found = _read_trajectory(folder / name, name, has_poses, min_frames)
        problems += found
        if trajectory is not None:
            trajectories.append(trajectory)
    return trajectories, problems


def _read_trajectory(folder: Path, name: str, has_poses: bool, min_frames: int) -> tuple[Trajectory | None, list[str]]:
    files, problems = _frame_files(folder)
    if len(files) < min_frames:
        problems.append(f"{folder}: {len(files)} frames, too few for a window, which takes {min_frames}")
    position = yaw = None
    if has_poses:
        try:
            position, yaw = _read_poses(folder / POSES)
        except DataError as error:
            problems.append(str(error))
        else:
            if len(position) != len(files):
                problems.append(f"{folder}: {len(files)} frames, but {len(position)} poses in {POSES}")
            broken = np.flatnonzero(~(np.isfinite(position).all(axis=1) & np.isfinite(yaw)))
            if len(broken):
                problems.append(f"{folder / POSES}: {len(broken)} poses are not finite, the first at frame {broken[0]}")
    if problems:
        return None, problems
    return Trajectory(name, folder, np.array(files), position, yaw), []


def _frame_files(folder: Path) -> tuple[list[str], list[str]]:
    """The files of frames 0, 1, … up to the last one; gaps are problems, and empty names in the list."""
    found: dict[int, str] = {}
    problems = []
    for file in sorted(os.listdir(folder)):
        if match := FRAME_FILE.fullmatch(file):
            time = int(match[1])
            if time in found:
                problems.append(f"{folder}: frame {time} is there twice, as {found[time]} and {file}")
            found[time] = file
    length = max(found, default=-1) + 1
    missing = length - len(found)
    if missing:
        first = next(time for time in range(length) if time not in found)
        problems.append(f"{folder}: {missing} of {length} frames missing, the first is frame {first}")
    return [found.get(time, "") for time in range(length)], problems


def _read_poses(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Position (T, 2) and yaw (T,) in float64."""
    poses = safe_pickle.load(path)
    if not isinstance(poses, dict) or not {"position", "yaw"} <= poses.keys():
        raise DataError(f"{path}: expected a dict with 'position' and 'yaw'")
    # Not lists: a few that hold each other many times over would unfold to more than any memory.
    if not all(isinstance(poses[key], np.ndarray) and poses[key].dtype.kind in "iuf" for key in ("position", "yaw")):
        raise DataError(f"{path}: position and yaw are not arrays of numbers")
    position, yaw = np.asarray(poses["position"], np.float64), np.asarray(poses["yaw"], np.float64)
    length = len(position) if position.ndim else 0
    if position.shape != (length, 2) or yaw.shape not in ((length,), (length, 1)):
        raise DataError(f"{path}: expected position (T, 2) and yaw (T,), not {position.shape} and {yaw.shape}")
    return position, yaw.reshape(length)
