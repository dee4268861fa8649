"""Reads latents for windows, from a dataset's latent cache or from shards."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from cdit.common.errors import DataError
from cdit.data.latents import TENSOR, Encoding, LatentCache, opened
from cdit.data.shards import LatentMember
from cdit.data.source import TrajectorySource


class LatentStore:
    """The latents of some trajectories, read from their files on demand.

    Files are mapped into memory during a read, so that only the requested frames are read, processes share the pages,
    and none of them counts as memory of the process.
    """

    def __init__(self, files: Sequence[Path | LatentMember]):
        self.files = files

    def read(self, trajectory: int, times: Sequence[int]) -> Tensor:
        """Latents (len(times), S, C, h, w) float32 of a trajectory (by its index) at `times`, repetitions allowed.

        Raises:
            DataError: the file is missing or damaged.
        """
        file = self.files[trajectory]
        if isinstance(file, LatentMember):
            return file.read(times).float()
        with opened(file) as file:
            latents = file.get_slice(TENSOR)
            return torch.stack([latents[time] for time in times]).float()


def open_latents(trajectories: Sequence[TrajectorySource], encoding: Encoding) -> LatentStore | None:
    """The latents of all the trajectories, or None if any of their datasets has none.

    Files are opened and their metadata checked, without reading the numbers. For shards, the index is trusted.

    Raises:
        DataError: a dataset's latents have another encoding, or are missing for some trajectories.
    """
    datasets: dict[Path | None, list[TrajectorySource]] = {}
    for trajectory in trajectories:
        datasets.setdefault(trajectory.dataset, []).append(trajectory)
    files: dict[Path | None, list[Path | LatentMember] | None] = {
        folder: _in_shards(found, encoding) if found[0].shard else _in_cache(found, encoding)
        for folder, found in datasets.items()
    }
    without = [str(folder) for folder, found in files.items() if found is None]
    if without:
        if len(without) < len(files):
            tqdm.write(f"{', '.join(without)}: no latents, so the images of the whole mix are read", file=sys.stderr)
        return None
    in_turn = {folder: iter(found) for folder, found in files.items()}
    return LatentStore([next(in_turn[trajectory.dataset]) for trajectory in trajectories])


def _in_cache(trajectories: Sequence[TrajectorySource], encoding: Encoding) -> list[Path] | None:
    """The files of trajectories of one folder; None if it has no latent cache."""
    cache = trajectories[0].dataset and LatentCache.open(trajectories[0].dataset)
    if cache is None:
        return None
    cache.expect(encoding)
    problems = [problem for trajectory in trajectories if (problem := cache.problem(trajectory))]
    if problems:
        raise DataError(
            f"{cache.folder} lacks the latents of {len(problems)} of {len(trajectories)} trajectories (the first: "
            f"{problems[0]}). Run `python -m cdit.data.encode` with this config, or train on the images with "
            "--data.latents no"
        )
    return [cache.file(trajectory) for trajectory in trajectories]


def _in_shards(trajectories: Sequence[TrajectorySource], encoding: Encoding) -> list[LatentMember] | None:
    """The members of trajectories of one sharded split; None if its shards hold only frames."""
    shard = trajectories[0].shard
    if shard.split.latents is None:
        return None
    if shard.split.latents.encoding != encoding:
        raise DataError(
            f"{shard.shards.location}: its latents were made with {shard.split.latents.encoding}; expected "
            f"{encoding}. Make shards of latents of this encoding (python -m cdit.data.shard), or train on the images, "
            "if the shards contain them, with --data.latents no"
        )
    return [LatentMember(trajectory) for trajectory in trajectories]
