import itertools
import math

import numpy as np
import pytest

from cdit.common.errors import UserError
from cdit.common.randomness import seed_of
from cdit.data.sampler import KeyedBatchSampler
from cdit.data.windows import WindowKey


def keys(windows=37, batch_size=12, seed=1, start_step=0, steps=10, **share):
    return list(KeyedBatchSampler(windows, batch_size, seed, start_step, steps, **share))


def test_every_window_once_an_epoch():
    sequence = [key.window for batch in keys(steps=37) for key in batch]  # 12 epochs, borders within batches
    epochs = [tuple(sequence[i : i + 37]) for i in range(0, len(sequence), 37)]
    assert len(epochs) == 12
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert len(set(epochs)) == 12


def test_a_batch_larger_than_the_dataset():
    batch = [key.window for key in keys(windows=5, batch_size=12, steps=1)[0]]
    assert sorted(batch[:5]) == sorted(batch[5:10]) == list(range(5))


SPLITS = [(2, 1), (1, 3), (2, 3), (4, 3), (12, 1), (3, 2), (5, 1), (1, 5), (7, 4), (16, 1), (13, 2)]


@pytest.mark.parametrize(("processes", "micro_batches"), SPLITS)
@pytest.mark.parametrize(("windows", "batch_size"), [(37, 12), (12, 12), (5, 12), (37, 1), (1, 3), (40, 7), (3, 64)])
def test_shares_are_the_whole_batch_at_any_split(windows, batch_size, processes, micro_batches):
    """What one process alone draws, dealt out like cards, and filled up with what counts for nothing."""
    whole = keys(windows, batch_size)
    shares = [
        keys(windows, batch_size, process_index=index, processes=processes, micro_batches=micro_batches)
        for index in range(processes)
    ]
    size = math.ceil(batch_size / (processes * micro_batches))
    for index, share in enumerate(shares):
        assert len(share) == 10 * micro_batches
        assert {len(part) for part in share} == {size}
        for step, batch in enumerate(whole):
            dealt = list(itertools.chain(*share[step * micro_batches : (step + 1) * micro_batches]))
            own = batch[index::processes]
            assert dealt[: len(own)] == own
            padding = dealt[len(own) :]
            assert {key.weight for key in padding} <= {0.0}
            assert {key.window for key in padding} <= {key.window for key in own or batch}
            assert all(key.step == step and key.sample >= batch_size for key in padding)


@pytest.mark.parametrize(("processes", "micro_batches"), SPLITS)
@pytest.mark.parametrize(("windows", "batch_size"), [(35, 7), (35, 5), (4, 2), (6, 1)])
def test_every_window_counts_once_an_epoch_at_any_split(windows, batch_size, processes, micro_batches):
    weights = np.zeros(windows)
    for index in range(processes):
        for part in keys(windows, batch_size, 1, 0, windows // batch_size, process_index=index, processes=processes,
                         micro_batches=micro_batches):  # fmt: skip
            for key in part:
                weights[key.window] += key.weight
    assert (weights == 1).all()


def test_one_process_draws_as_it_always_did():
    """The keys of a batch that divides evenly, derived once more from the definition."""
    for step, batch in enumerate(keys()):
        for sample, key in enumerate(batch):
            epoch, place = divmod(step * 12 + sample, 37)
            window = np.random.default_rng(seed_of(1, epoch)).permutation(37)[place]
            assert key == WindowKey(window, step, sample, 1.0)


def test_another_order():
    """One that tells its epoch."""
    batches = keys(windows=4, batch_size=3, steps=3, order=lambda epoch: 10 * epoch + np.arange(4))
    assert [[key.window for key in batch] for batch in batches] == [[0, 1, 2], [3, 10, 11], [12, 13, 20]]


def test_resuming_gives_the_batches_that_were_left():
    assert keys(start_step=6, micro_batches=2) == keys(micro_batches=2)[12:]
    assert keys(start_step=10) == []


def test_seeds_differ():
    assert keys(seed=1) != keys(seed=2)


def test_an_epoch_is_keyed_apart_from_a_sample():
    """Numpy takes (seed, epoch) for the same key as (seed, epoch, 0)."""
    order = [key.window for key in keys(batch_size=37, seed=3, steps=3)[2]]
    assert order != np.random.default_rng((3, 2, 0)).permutation(37).tolist()
    assert order == np.random.default_rng(seed_of(3, 2)).permutation(37).tolist()


def test_length():
    assert len(KeyedBatchSampler(37, 12, 1, 4, 10, 0, 2, 3)) == 18
    assert len(keys(start_step=4, processes=2, micro_batches=3)) == 18


def test_an_empty_batch():
    with pytest.raises(UserError, match="batch_size is 0, expected at least 1"):
        KeyedBatchSampler(10, 0, 0, 0, 1)
