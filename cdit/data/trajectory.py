"""Reads trajectories and splits from disk (see `cdit.data.layout`) and says everything that is wrong with them."""

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cdit.common.errors import DataError
from cdit.common.files import check_inside, check_name, read_text
from cdit.data import safe_pickle
from cdit.data.layout import DESCRIPTION, LATENTS, POSES, DatasetInfo, split_file

MAX_POSE = 1e9
"""Largest coordinate (metres) and yaw (radians): what is finite here has finite differences and squares in float32."""
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
        DataError: the list is missing, unreadable or empty, or a name leads out of the dataset (see `check_name`).
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
        folder: the dataset.
        split: name of the split.
        split_folder: what holds `<split>/traj_names.txt`, where that is not `<folder>/splits`.
        min_frames: trajectories with fewer frames are a problem.
        follow_links: whether links within the dataset may lead out of its folder; else those are problems.
        may_lack: whether frames may be missing where poses say how many there are: they fail when they are read.

    Returns:
        The trajectories without a problem, in the order of the split file; and the problems, one line each.
        Without a `dataset.json`, poses are expected of every trajectory if any of them has a `traj_data.pkl`.
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
    """What is wrong with a trajectory of which a link leads out of the dataset."""
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
    length = max(files, default=-1) + 1  # of which no list is made: a file's name can have any number
    pose_problems = []
    position = yaw = None
    if has_poses:
        try:
            position, yaw = _read_poses(folder / POSES)
        except DataError as error:
            pose_problems.append(str(error))
        else:
            if may_lack and files:
                length = max(length, len(position))
            if len(position) != length:
                pose_problems.append(f"{folder}: {length} frames, but {len(position)} poses in {POSES}")
            largest = np.maximum(np.abs(position).max(axis=1), np.abs(yaw))
            broken = np.flatnonzero(~(largest <= MAX_POSE))
            if len(broken):
                pose_problems.append(
                    f"{folder / POSES}: {len(broken)} poses are not finite, or beyond {MAX_POSE:g} metres or radians, "
                    f"the first at frame {broken[0]}"
                )
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
    return Trajectory(name, folder, names, position, yaw), []


def _frame_files(folder: Path) -> tuple[dict[int, str], list[str]]:
    """The files of the frames by their numbers, and what is wrong with them."""
    found: dict[int, str] = {}
    problems = []
    for file in sorted(os.listdir(folder)):
        if match := FRAME_FILE.fullmatch(file):
            time = int(match[1])
            if time in found:
                problems.append(f"{folder}: frame {time} is there twice, as {found[time]} and {file}")
            found[time] = file
    return found, problems


def _read_poses(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Position (T, 2) and yaw (T,) in float64."""
    poses = safe_pickle.load(path)
    if not isinstance(poses, dict) or not {"position", "yaw"} <= poses.keys():
        raise DataError(f"{path}: expected a dict with 'position' and 'yaw'")
    # Not lists: a few that hold each other many times over would unfold to more than any memory.
    if not all(isinstance(poses[key], np.ndarray) and poses[key].dtype.kind in "iuf" for key in ("position", "yaw")):
        raise DataError(f"{path}: position and yaw are not arrays of numbers")
    with np.errstate(over="ignore"):  # numbers of more bits than float64 become infinite
        position, yaw = np.asarray(poses["position"], np.float64), np.asarray(poses["yaw"], np.float64)
    length = len(position) if position.ndim else 0
    if position.shape != (length, 2) or yaw.shape not in ((length,), (length, 1)):
        raise DataError(f"{path}: expected position (T, 2) and yaw (T,), not {position.shape} and {yaw.shape}")
    return position, yaw.reshape(length)
