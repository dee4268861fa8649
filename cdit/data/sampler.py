"""Chooses the windows of each step as a function of (seed, step)."""

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np

from cdit.common.errors import UserError
from cdit.data.order import shuffled
from cdit.data.windows import WindowKey


class KeyedBatchSampler:
    """This process's share of every step's batch, for a loader's `batch_sampler`.

    Step s takes positions s·batch_size … (s+1)·batch_size - 1 of an endless sequence of epochs, each a permutation of
    all windows keyed by (seed, epoch). There is no state: a run resumed at `start_step` sees the same batches as an
    uninterrupted one. The micro-batches of all processes form the batch of the step, with each sample once: process p
    of P takes samples p, p + P, … and splits them into `micro_batches` parts. Smaller parts are padded with keys of
    weight 0, so that every process does the same work.

    Args:
        batch_size: windows in a step's batch, over all processes and micro-batches.
        start_step: the first step, counted from 0.
        steps: the last step is `steps - 1`, whatever `start_step` is.
        processes: number of processes that share each batch.
        micro_batches: number of parts into which each process splits its share (gradient accumulation); yielded in
            order.
        order: gives the permutation (windows,) of an epoch; by default `shuffled` with the seed.

    Raises:
        UserError: batch_size is less than 1.
    """

    def __init__(
        self,
        windows: int,
        batch_size: int,
        seed: int,
        start_step: int,
        steps: int,
        process_index: int = 0,
        processes: int = 1,
        micro_batches: int = 1,
        order: Callable[[int], np.ndarray] | None = None,
    ):
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}, expected at least 1")
        self.windows = windows
        self.batch_size = batch_size
        self.steps = range(start_step, steps)
        self.process_index = process_index
        self.processes = processes
        self.micro_batches = micro_batches
        self.order = order or (lambda epoch: shuffled(windows, seed, epoch))

    def __len__(self) -> int:
        return len(self.steps) * self.micro_batches

    def __iter__(self) -> Iterator[list[WindowKey]]:
        size = -(-self.batch_size // (self.processes * self.micro_batches))  # size of a part, rounded up
        own = self.process_index % self.batch_size  # the sample that padding repeats: of this process, if it has any
        order = lru_cache(maxsize=2)(self.order)  # a batch may reach into the next epoch, and padding back
        for step in self.steps:
            for part in range(self.micro_batches):
                keys = []
                for place in range(part * size, (part + 1) * size):
                    sample = self.process_index + place * self.processes
                    is_real = sample < self.batch_size
                    epoch, index = divmod(step * self.batch_size + (sample if is_real else own), self.windows)
                    keys.append(WindowKey(int(order(epoch)[index]), step, sample, float(is_real)))
                yield keys
