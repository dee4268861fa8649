"""The cases of an evaluation, each a trajectory and a time in it, from an index file of NWM or spread over a split."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cdit.common.errors import DataError, UserError
from cdit.data import safe_pickle
from cdit.data.windows import WindowDataset
from cdit.loading import spread


class Case(NamedTuple):
    """One context."""

    window: int
    """Index of its window in the dataset."""
    trajectory: int
    """Index of its trajectory in the dataset."""
    name: str
    now: int
    """Index of the last context frame."""


def read_index(path: Path | str, dataset: WindowDataset, reach: int, min_history: int = 1) -> list[Case]:
    """The cases of an index file of NWM: a pickled list of (trajectory, time, min_offset, max_offset).

    The two offsets are only checked: the protocol determines what is predicted.

    Args:
        reach: how many frames the protocol needs after the current one.
        min_history: how many frames up to the current one the model needs.

    Raises:
        DataError: an entry cannot be used; the message names the file and the first such entry.
    """
    entries = safe_pickle.load(path)
    if not isinstance(entries, list | tuple) or not entries:
        raise DataError(f"{path}: expected a list of (trajectory, time, min_offset, max_offset)")
    trajectories = {trajectory.name: i for i, trajectory in enumerate(dataset.trajectories)}
    windows = {dataset.locate(window): window for window in range(len(dataset))}
    cases = []
    for number, entry in enumerate(entries):
        where = f"{path}: entry {number} (from 0)"
        if not _is_entry(entry):  # not printed: a list that contains itself many times over has no end
            raise DataError(f"{where}: expected (trajectory, time, min_offset, max_offset), a name and whole numbers")
        name, now, low, high = entry[0], *map(int, entry[1:])
        if name not in trajectories:
            raise DataError(f"{where}: no usable trajectory {name[:200]!r} in the split")
        last = len(dataset.trajectories[trajectories[name]]) - 1
        if not min_history - 1 <= now <= last or low > high:
            raise DataError(
                f"{where}: time {now} with offsets {low} to {high}, expected a time from {min_history - 1} to {last}, "
                f"the last frame of {name}, and offsets in order"
            )
        if now + reach > last:
            raise DataError(f"{where}: {reach} frames after time {now} are predicted, but {name} ends with {last}")
        cases.append(Case(windows[trajectories[name], now], trajectories[name], name, now))
    return cases


def spread_cases(dataset: WindowDataset, reach: int, samples: int, field: str) -> list[Case]:
    """At most `samples` cases, evenly spaced over the windows with a full context and `reach` frames after it.

    Raises:
        UserError: there are none; the message names the field and what is possible.
    """
    windows = dataset.windows_with([reach])
    if not windows:
        fps, past = dataset.info.fps, dataset.config.context_frames
        longest = max(map(len, dataset.trajectories)) - past
        raise UserError(
            f"{field}: no trajectory of the split has {past} frames of context and {reach / fps:g} s ({reach} frames) "
            + (f"after them; the longest possible is {longest / fps:g} s" if longest > 0 else "after them")
        )
    return [case_of(dataset, window) for window in spread(windows, samples)]


def case_of(dataset: WindowDataset, window: int) -> Case:
    """The case of a window."""
    trajectory, now = dataset.locate(window)
    return Case(window, trajectory, dataset.trajectories[trajectory].name, now)


def content_hash(dataset: WindowDataset, cases: Sequence[Case], reach: int) -> str:
    """Hexadecimal SHA-256 of the dataset's content for the cases, independent of its location.

    That is the poses, texts and further conditions of their trajectories, and for each case the current frame and the
    one `reach` frames later.
    """
    digest = hashlib.sha256()
    for index in sorted({case.trajectory for case in cases}):
        trajectory = dataset.trajectories[index]
        digest.update(f"{trajectory.name} {len(trajectory)}".encode())
        if trajectory.position is not None:
            digest.update(trajectory.position.tobytes() + trajectory.yaw.tobytes())
        if trajectory.actions is not None:
            digest.update(trajectory.actions.tobytes())
        if any(trajectory.texts):
            digest.update(repr(list(trajectory.texts)).encode())
        for name, values in sorted(trajectory.conditions.items()):
            digest.update(name.encode() + values.tobytes())
    for case in cases:
        frames = dataset.trajectories[case.trajectory].frames([case.now, case.now + reach])
        digest.update(hashlib.sha256(frames.numpy().tobytes()).digest())
    return digest.hexdigest()


def others(cases: Sequence[Case]) -> list[int]:
    """For each case another one, whose actions or context replace its own, to measure what these contribute.

    It is half the list away, or the next one from there on that is of another trajectory, so that the actions are not
    its own at another time.
    """
    trajectories = np.array([case.trajectory for case in cases])
    order = (np.arange(len(cases)) + len(cases) // 2) % len(cases)
    found = []
    for i in range(len(cases)):
        candidates = np.roll(order, -i)
        elsewhere = np.flatnonzero(trajectories[candidates] != trajectories[i])
        found.append(int(candidates[elsewhere[0] if len(elsewhere) else 0]))
    return found


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, list | tuple) or len(entry) != 4:
        return False
    name, *numbers = entry
    return isinstance(name, str) and all(
        isinstance(number, int | np.integer) and not isinstance(number, bool) and abs(number) < 2**31
        for number in numbers
    )
