"""Fetches the shards of batches to come while others are trained on."""

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread

from cdit.common.errors import Interrupted, UserError
from cdit.data.sampler import KeyedBatchSampler
from cdit.data.shards import Shard, ShardTrajectory
from cdit.data.trajectory import Trajectory
from cdit.data.windows import WindowDataset, WindowKey

AHEAD = 256
"""Batches between asking for a shard and needing it."""
THREADS = 4


def fetching_ahead(sampler: KeyedBatchSampler, dataset: WindowDataset) -> "KeyedBatchSampler | FetchingAhead":
    """The sampler's batches; where the dataset has shards that are afar, these are fetched ahead of them."""
    is_afar = any(_shard_afar(trajectory) for trajectory in dataset.trajectories)
    return FetchingAhead(sampler, dataset) if is_afar else sampler


class FetchingAhead:
    """A sampler's batches, unchanged; the shards that they need are fetched from the time they are `AHEAD` batches off.

    Whatever goes wrong is left to who reads the shard: it will meet it again.
    """

    def __init__(self, sampler: KeyedBatchSampler, dataset: WindowDataset):
        self.sampler, self.dataset = sampler, dataset

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[WindowKey]]:
        wanted: SimpleQueue[Shard | None] = SimpleQueue()
        for _ in range(THREADS):
            Thread(target=_fetch, args=(wanted,), daemon=True).start()
        last_needed: dict[str, int] = {}
        waiting: deque[list[WindowKey]] = deque()
        try:
            for number, keys in enumerate(self.sampler):
                for key in keys:
                    trajectory, _ = self.dataset.locate(key.window)
                    if shard := _shard_afar(self.dataset.trajectories[trajectory]):
                        # What was not needed for so long may have been let go of.
                        if number - last_needed.get(str(shard), -AHEAD) >= AHEAD:
                            wanted.put(shard)
                        last_needed[str(shard)] = number
                waiting.append(keys)
                if len(waiting) > AHEAD:
                    yield waiting.popleft()
            yield from waiting
        finally:
            for _ in range(THREADS):
                wanted.put(None)


def _shard_afar(trajectory: Trajectory | ShardTrajectory) -> Shard | None:
    """The shard that the trajectory is in, if that has to be fetched."""
    is_afar = isinstance(trajectory, ShardTrajectory) and trajectory.shard.shards.is_remote
    return trajectory.shard if is_afar else None


def _fetch(wanted: "SimpleQueue[Shard | None]") -> None:
    while (shard := wanted.get()) is not None:
        with suppress(UserError, Interrupted):
            shard.shards.file(shard.record)
