"""Fetches remote shards ahead of the batches that need them."""

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread

from cdit.common.errors import Interrupted, UserError
from cdit.data.sampler import KeyedBatchSampler
from cdit.data.shards import Shard
from cdit.data.windows import WindowDataset, WindowKey

AHEAD = 256
"""Batches between requesting a shard and needing it."""
THREADS = 4


def fetching_ahead(sampler: KeyedBatchSampler, dataset: WindowDataset) -> "KeyedBatchSampler | FetchingAhead":
    """The sampler's batches; if the dataset has remote shards, these are fetched ahead of them."""
    is_remote = any(trajectory.shard and trajectory.shard.is_remote for trajectory in dataset.trajectories)
    return FetchingAhead(sampler, dataset) if is_remote else sampler


class FetchingAhead:
    """A sampler's batches, unchanged; threads fetch the shards that a batch needs `AHEAD` batches before it.

    Errors are ignored here: they occur again when the shard is read.
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
                    shard = self.dataset.trajectories[trajectory].shard
                    if shard and shard.is_remote:
                        # A shard that has not been needed for this long may have been evicted.
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


def _fetch(wanted: "SimpleQueue[Shard | None]") -> None:
    while (shard := wanted.get()) is not None:
        with suppress(UserError, Interrupted):
            shard.fetch()
