"""The order of windows that lie in shards: each once, few shards at a time, well mixed, the same for everybody."""

import numpy as np
import pytest

from cdit.data.order import laned, shuffled
from cdit.data.sampler import KeyedBatchSampler

RANDOM = np.random.default_rng(7)
EVEN = np.arange(0, 40 * 25 + 1, 25)  # 40 shards of 25 windows
UNEVEN = np.cumsum([0, *RANDOM.integers(1, 60, size=33)])


def shard_of(bounds: np.ndarray, windows: np.ndarray) -> np.ndarray:
    return np.searchsorted(bounds, windows, side="right") - 1


@pytest.mark.parametrize("bounds", [EVEN, UNEVEN, np.array([0, 1]), np.array([0, 3, 3, 8])], ids=str)
@pytest.mark.parametrize(("lanes", "reach"), [(1, 1), (4, 2), (7, 3), (64, 2), (2000, 50)])
def test_every_window_once(bounds, lanes, reach):
    for epoch in range(3):
        assert sorted(laned(bounds, 3, epoch, lanes, reach)) == list(range(bounds[-1]))


def test_seed_and_epoch_decide():
    orders = {tuple(laned(UNEVEN, seed, epoch, 4, 2)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert np.array_equal(laned(UNEVEN, 1, 2, 4, 2), laned(UNEVEN, 1, 2, 4, 2))


@pytest.mark.parametrize("bounds", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("lanes", [1, 3, 8])
@pytest.mark.parametrize("reach", [1, 2, 4])
def test_a_lane_needs_few_shards_at_a_time(bounds, lanes, reach):
    """Between its first and last window: never more than reach + 1 shards of a lane are begun and not ended."""
    for epoch in range(3):
        order = laned(bounds, 0, epoch, lanes, reach)
        for lane in range(lanes):
            shards = shard_of(bounds, order[lane::lanes])
            first = {shard: np.flatnonzero(shards == shard)[0] for shard in set(shards)}
            last = {shard: np.flatnonzero(shards == shard)[-1] for shard in set(shards)}
            for place in range(len(shards)):
                assert sum(first[shard] <= place <= last[shard] for shard in first) <= reach + 1


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_read_their_own_shards(processes):
    """Eight lanes of five shards: of 40 shards a process needs its lanes', and those that a border cuts."""
    lanes, needed = 8, []
    for index in range(processes):
        sampler = KeyedBatchSampler(
            1000, 40, 5, 0, 25, index, processes, order=lambda epoch: laned(EVEN, 5, epoch, lanes, 2)
        )
        windows = np.array([key.window for batch in sampler for key in batch])
        needed.append(set(shard_of(EVEN, windows)))
        assert len(needed[-1]) <= (lanes // processes) * 6
        share = 40 // processes  # of a step: five windows of each lane
        at_a_time = [set(shard_of(EVEN, windows[i : i + share])) for i in range(0, len(windows), share)]
        assert max(map(len, at_a_time)) <= (lanes // processes) * 4
    assert set.union(*needed) == set(range(40))


def test_every_epoch_begins_elsewhere():
    assert len({int(shard_of(EVEN, laned(EVEN, 0, epoch, 1, 1)[:1])[0]) for epoch in range(20)}) > 10


def test_a_batch_comes_from_all_lanes():
    """Eight lanes of five shards: the eight windows of a batch are of eight shards, or nearly."""
    order = laned(EVEN, 0, 0, 8, 2).reshape(-1, 8)
    assert np.mean([len(set(shard_of(EVEN, batch))) for batch in order]) > 7


def test_windows_of_a_lane_are_mixed():
    """Against a line of windows as they lie: hardly any follows its neighbour, and shards are read in another order."""
    order = laned(EVEN, 0, 0, 1, 4)
    steps = np.diff(order)
    assert np.mean(steps == 1) < 0.03
    assert np.mean(np.abs(steps) < 5) < 0.12
    assert np.mean(np.diff(shard_of(EVEN, order)) == 0) < 0.5


def test_folders_are_shuffled_evenly():
    counts = np.zeros((5, 5))
    for epoch in range(2000):
        counts[np.arange(5), shuffled(5, 0, epoch)] += 1
    assert np.abs(counts - 400).max() < 5 * np.sqrt(400 * 0.8)


def test_resumed_in_mid_epoch():
    def keys(start):
        return list(KeyedBatchSampler(1000, 24, 5, start, 90, order=lambda epoch: laned(EVEN, 5, epoch, 8, 2)))

    assert keys(57) == keys(0)[57:]
