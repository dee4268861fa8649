"""Finds all problems of a dataset before training.

    python -m cdit.data.check FOLDER

Lists all problems at once and exits with code 2, or summarises the dataset and exits with code 0.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from cdit.common.cli import parse_config, run
from cdit.common.errors import DataError
from cdit.common.options import names
from cdit.data.trajectory import Trajectory, read_names, read_split

if TYPE_CHECKING:
    from cdit.data.frames import Member


@dataclass
class Findings:
    """The result of a check."""

    problems: list[str] = field(default_factory=list)
    """One line each, naming the file."""
    trajectories: dict[str, list[Trajectory]] = field(default_factory=dict)
    """Trajectories without problems, by split."""


def check(
    folder: Path | str,
    splits: Iterable[str] | None = None,
    decode_frames: bool = True,
    split_folder: Path | str | None = None,
    min_frames: int = 2,
    follow_links: bool = False,
) -> Findings:
    """Reads the splits of a dataset and decodes each frame, with a progress bar.

    Args:
        folder: the dataset.
        splits: names of the splits; by default train, test and all others.
        decode_frames: whether to decode the frames as well.
        split_folder: the folder of `<split>/traj_names.txt`; by default `<folder>/splits`.
        min_frames: smallest number of frames of a trajectory.
        follow_links: whether links within the dataset may lead out of its folder.
    """
    from cdit.data.shards import is_sharded  # imports torch, for which --help does not wait

    folder = Path(folder)
    if not folder.is_dir():
        return Findings([f"{folder}: no such dataset folder"])
    if is_sharded(folder):
        return Findings([f"{folder}: holds shards, which `python -m cdit.data.shard verify` checks"])
    if splits is None:
        there = Path(split_folder or folder / "splits").glob("*/traj_names.txt")
        splits = dict.fromkeys(["train", "test", *sorted(path.parent.name for path in there)])
    findings = Findings()
    splits_of: dict[str, list[str]] = {}
    for split in splits:
        findings.trajectories[split], problems = read_split(folder, split, split_folder, min_frames, follow_links)
        findings.problems += [problem for problem in problems if problem not in findings.problems]
        with suppress(DataError):  # already among the problems
            for name in dict.fromkeys(read_names(folder, split, split_folder)):
                splits_of.setdefault(name, []).append(split)
    findings.problems += [
        f"{folder / name}: in more than one split ({', '.join(several)})"
        for name, several in splits_of.items()
        if len(several) > 1
    ]
    if decode_frames:
        findings.problems += _frame_problems(
            {trajectory.name: trajectory for split in findings.trajectories.values() for trajectory in split}.values()
        )
    return findings


def _frame_problems(trajectories: Iterable[Trajectory]) -> list[str]:
    problems = []
    total = sum(map(len, trajectories))
    with ThreadPoolExecutor() as threads, tqdm(total=total, unit="frame", desc="decoding", leave=False) as bar:
        for trajectory in trajectories:
            first_of_size: dict[str, str] = {}
            paths = map(trajectory.frame, range(len(trajectory)))
            for file, size in zip(trajectory.files, threads.map(size_or_problem, paths), strict=True):
                bar.update()
                if isinstance(size, DataError):
                    problems.append(str(size))
                else:
                    first_of_size.setdefault(size, str(file))
            if len(first_of_size) > 1:
                sizes = ", ".join(f"{file} is {size}" for size, file in first_of_size.items())
                problems.append(f"{trajectory.folder}: frames of different sizes ({sizes})")
    return problems


def size_or_problem(path: "Path | Member") -> str | DataError:
    """Width × height of an image, or its problem."""
    from cdit.data.frames import decode

    try:
        height, width = decode(path).shape[-2:]
    except DataError as error:
        return error
    return f"{width}×{height}"


@dataclass
class CheckConfig:
    """What to check."""

    folder: str
    """The dataset folder."""
    split: str | None = None
    """Splits to check, separated by commas; by default train, test and all others."""
    splits: str | None = None
    """Folder with <split>/traj_names.txt; by default FOLDER/splits."""
    min_frames: int = 2
    """Fewest frames a trajectory may have."""
    fast: bool = False
    """Do not decode the frames."""
    follow_links: bool = False
    """Whether links within the dataset folder may lead out of it."""


def main() -> None:
    """The command line.

    Raises:
        DataError: there are problems; the message lists them all.
    """
    config = parse_config(CheckConfig, __doc__, positional=True)
    findings = check(
        config.folder, names(config.split), not config.fast, config.splits, config.min_frames, config.follow_links
    )
    if findings.problems:
        raise DataError(f"{config.folder}: {len(findings.problems)} problems\n  " + "\n  ".join(findings.problems))
    summary = "; ".join(
        f"{split}: {len(trajectories)} trajectories, {sum(map(len, trajectories))} frames"
        for split, trajectories in findings.trajectories.items()
    )
    print(f"{config.folder}: fine ({summary})")


if __name__ == "__main__":
    run(main)
