import itertools

import numpy as np
import pytest

from cdit.data.sampler import KeyedBatchSampler
from cdit.errors import UserError
from cdit.randomness import seed_of


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


@pytest.mark.parametrize(("processes", "micro_batches"), [(2, 1), (1, 3), (2, 3), (4, 3), (12, 1)])
def test_shares_are_the_whole_batch_at_any_split(processes, micro_batches):
    whole = keys()
    shares = [keys(process_index=index, processes=processes, micro_batches=micro_batches) for index in range(processes)]
    for share in shares:
        assert len(share) == 10 * micro_batches
        assert {len(batch) for batch in share} == {12 // processes // micro_batches}
    for step, batch in enumerate(whole):
        parts = [share[step * micro_batches + micro] for share in shares for micro in range(micro_batches)]
        assert sorted(itertools.chain(*parts)) == sorted(batch)
        assert sorted(key.sample for key in itertools.chain(*parts)) == list(range(12))


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


@pytest.mark.parametrize(("batch_size", "processes", "micro_batches"), [(12, 5, 1), (12, 4, 2), (0, 1, 1)])
def test_a_batch_that_cannot_be_shared(batch_size, processes, micro_batches):
    with pytest.raises(UserError, match=rf"batch_size is {batch_size}, .*{processes} × {micro_batches}"):
        KeyedBatchSampler(10, batch_size, 0, 0, 1, 0, processes, micro_batches)
