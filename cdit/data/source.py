"""Interfaces of datasets: trajectories, which windows are cut from, and sources, which open them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import numpy as np

from cdit.common.registry import Registry
from cdit.data.action_space import ActionKind
from cdit.data.layout import DatasetInfo

if TYPE_CHECKING:  # --help does not wait for torch
    from torch import Tensor

    from cdit.data.shard_cache import ShardCache
    from cdit.data.shards import Shard


class TrajectorySource(Protocol):
    """One trajectory. A class that derives from this one needs no more than `name`, `__len__` and `frames`."""

    name: str
    """Unique in the dataset; part of the order of windows."""
    position: np.ndarray | None = None
    """(T, 2) float64 in metres, world coordinates; None without poses."""
    yaw: np.ndarray | None = None
    """(T,) float64 in radians, counter-clockwise from +x; None without poses."""
    actions: np.ndarray | None = None
    """(T, K) numbers of every frame, which lead to the next one, for actions other than motion (see
    `cdit.data.action_space`); None without."""
    conditions: Mapping[str, np.ndarray] = MappingProxyType({})
    """Further numbers per frame, (T, …) each; if all trajectories have them, those at the goal go to
    `Condition.extra`."""
    texts: Sequence[str] = ()
    """Text descriptions of what is done at each of the T frames: '' where unknown, () if there are none."""
    dataset: Path | None = None
    """Folder with the dataset's latent cache; None if it has none."""
    shard: "Shard | None" = None
    """The file that holds this and other trajectories; None if this one can be read by itself."""

    def __len__(self) -> int:
        """Number of frames T."""

    def frames(self, times: Sequence[int]) -> "Tensor":
        """The recorded frames (N, 3, H, W), uint8 RGB, at N different `times`, each in 0 … T - 1.

        Raises:
            DataError: a frame cannot be read; the message names its file.
        """


Opened = tuple[Sequence[TrajectorySource], DatasetInfo]


class DatasetSource:
    """A way to store datasets. Derive from it to add one, and set `data.source` to its path, `my_module:MySource`."""

    @staticmethod
    def open(
        folder: str,
        split: str,
        *,
        splits: str | None,
        follow_links: bool,
        fps: float | None,
        camera: str | None,
        action_key: str,
        action_kind: ActionKind,
        may_lack: bool,
        cache: "ShardCache | None",
    ) -> Opened:
        """Opens a split of a dataset; frames are not read yet.

        Args:
            folder: `data.folder`.
            split: name of the split.
            splits: `data.splits`.
            follow_links: `data.follow_links`.
            fps: `data.fps`.
            camera: `data.camera`.
            action_key: `data.action_key`.
            action_kind: `data.action_kind`.
            may_lack: whether frames may be missing; reading a missing frame then fails.
            cache: keeps remote files; by default one in the usual place.

        Returns:
            All trajectories of the split, in the same order at every call, and what the dataset is.

        Raises:
            DataError: the dataset has problems; the message lists them.
        """
        raise NotImplementedError


SOURCES: Registry[type[DatasetSource]] = Registry("data.source", DatasetSource)
register_source = SOURCES.register
