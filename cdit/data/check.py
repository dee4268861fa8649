"""Finds all problems of a dataset before training.

    python -m cdit.data.check FOLDER

Lists all problems at once and exits with code 2, or summarises the dataset and exits with code 0.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from cdit.common.cli import parse_config, run
from cdit.common.errors import DataError, UserError
from cdit.common.limits import Positive
from cdit.common.options import names
from cdit.data.config import StoredDataset
from cdit.data.trajectory import read_names, read_split

if TYPE_CHECKING:
    from cdit.data.source import TrajectorySource

DEGREES = "yaw changes by more than 2π between frames, expected radians"


@dataclass
class Findings:
    """The result of a check."""

    problems: list[str] = field(default_factory=list)
    """One line each, naming the file."""
    trajectories: dict[str, "Sequence[TrajectorySource]"] = field(default_factory=dict)
    """Trajectories without problems, by split."""


def check(
    source: StoredDataset, splits: Iterable[str] | None = None, decode_frames: bool = True, min_frames: int = 2
) -> Findings:
    """Reads splits of a dataset, by default train, test and all others, and decodes each frame."""
    from cdit.data.sources import is_sharded, listed_splits  # import torch, for which --help does not wait

    if source.source in ("auto", "shards") and is_sharded(source.folder):
        return Findings([f"{source.folder}: holds shards, which `python -m cdit.data.shard verify` checks"])
    splits = splits or dict.fromkeys(["train", "test", *listed_splits(source)])
    findings = Findings()
    splits_of: dict[str, list[str]] = {}
    for split in splits:
        listed, findings.trajectories[split], problems = _read(source, split, min_frames)
        findings.problems += [problem for problem in problems if problem not in findings.problems]
        for name in dict.fromkeys(listed):
            splits_of.setdefault(name, []).append(split)
    findings.problems += [
        f"{source.folder}/{name}: in more than one split ({', '.join(several)})"
        for name, several in splits_of.items()
        if len(several) > 1
    ]
    each = {one.name: one for found in findings.trajectories.values() for one in found}
    findings.problems += [f"{source.folder}/{name}: {DEGREES}" for name, one in each.items() if in_degrees(one.yaw)]
    if decode_frames:
        total = sum(map(len, each.values()))
        # Only files can be read in several threads.
        workers = None if source.source in ("auto", "folder") else 1
        with ThreadPoolExecutor(workers) as threads, tqdm(total=total, unit="frame", leave=False) as bar:
            for trajectory in each.values():
                findings.problems += frame_problems(trajectory, f"{source.folder}/{trajectory.name}", threads, bar)
    return findings


def _read(
    source: StoredDataset, split: str, min_frames: int
) -> "tuple[list[str], Sequence[TrajectorySource], list[str]]":
    """Names of the split's trajectories, those without problems, and the problems."""
    folder = source.folder
    if source.source in ("auto", "folder"):
        trajectories, problems = read_split(folder, split, source.splits, min_frames, source.follow_links)
        listed: list[str] = []
        with suppress(DataError):  # already among the problems
            listed = read_names(folder, split, source.splits)
        return listed, trajectories, problems

    from cdit.data.sources import open_source

    try:
        trajectories, _ = open_source(source, split)
    except UserError as error:
        return [], [], [str(error)]
    short = [one for one in trajectories if len(one) < min_frames]
    problems = [f"{folder}/{one.name}: {len(one)} frames, expected at least {min_frames}" for one in short]
    return [one.name for one in trajectories], [one for one in trajectories if one not in short], problems


def in_degrees(yaw: np.ndarray | None) -> bool:
    """Whether headings (T,) change by more than 2π between frames, as neither wrapped nor unwrapped radians do."""
    return yaw is not None and bool((np.abs(np.diff(yaw)) > 2 * np.pi + 1e-3).any())


def frame_problems(
    trajectory: "TrajectorySource", name: str, threads: ThreadPoolExecutor, bar: tqdm | None = None
) -> list[str]:
    """Decodes all frames of a trajectory, called `name` in messages; returns the problems, one line each."""

    def size(time: int) -> str | DataError:
        try:
            height, width = trajectory.frames([time]).shape[-2:]
        except DataError as error:
            return error
        return f"{width}×{height}"

    problems = []
    first_of_size: dict[str, int] = {}
    for time, found in enumerate(threads.map(size, range(len(trajectory)))):
        if isinstance(found, DataError):
            problems.append(str(found))
        else:
            first_of_size.setdefault(found, time)
        if bar is not None:
            bar.update()
    if len(first_of_size) > 1:
        sizes = ", ".join(f"frame {time} is {size}" for size, time in first_of_size.items())
        problems.append(f"{name}: frames of different sizes ({sizes})")
    return problems


@dataclass
class CheckConfig(StoredDataset):
    """What to check."""

    split: str | None = None
    """Splits to check, separated by commas; by default train, test and all others."""
    min_frames: Positive[int] = 2
    """Fewest frames a trajectory may have."""
    fast: bool = False
    """Do not decode the frames."""


def main() -> None:
    """The command line.

    Raises:
        DataError: there are problems; the message lists them all.
    """
    config = parse_config(CheckConfig, __doc__, positional=True)
    findings = check(config, names(config.split), not config.fast, config.min_frames)
    if findings.problems:
        raise DataError(f"{config.folder}: {len(findings.problems)} problems\n  " + "\n  ".join(findings.problems))
    summary = "; ".join(
        f"{split}: {len(trajectories)} trajectories, {sum(map(len, trajectories))} frames"
        for split, trajectories in findings.trajectories.items()
    )
    print(f"{config.folder}: fine ({summary})")


if __name__ == "__main__":
    run(main)
