"""Which windows each step trains on, as a function of (seed, step) alone."""

from collections.abc import Iterator

import numpy as np

from cdit.data.windows import WindowKey
from cdit.errors import UserError
from cdit.randomness import seed_of


class KeyedBatchSampler:
    """This process's share of every step's batch, for a loader's `batch_sampler`.

    Step s consumes places s·batch_size … (s+1)·batch_size - 1 of an endless sequence of epochs, each a permutation of
    all windows keyed by (seed, epoch). There is no state: a run resumed at `start_step` sees the batches it would have
    seen. All processes' micro-batches of a step together are the step's batch, each sample once.

    Args:
        windows: number of windows in the dataset.
        batch_size: windows in a step's batch, over all processes and micro-batches.
        seed: first part of the permutations' key.
        start_step: the first step, counted from 0.
        steps: where the run ends: the last step is `steps - 1`, whatever `start_step` is.
        process_index: this process, from 0.
        processes: how many share each batch.
        micro_batches: into how many parts each process cuts its share (gradient accumulation); yielded in order.

    Raises:
        UserError: batch_size is not divisible by processes · micro_batches.
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
    ):
        if batch_size < 1 or batch_size % (processes * micro_batches):
            raise UserError(
                f"batch_size is {batch_size}, expected a multiple of processes × micro_batches = "
                f"{processes} × {micro_batches}"
            )
        self.windows = windows
        self.batch_size = batch_size
        self.seed = seed
        self.steps = range(start_step, steps)
        self.process_index = process_index
        self.processes = processes
        self.micro_batches = micro_batches

    def __len__(self) -> int:
        return len(self.steps) * self.micro_batches

    def __iter__(self) -> Iterator[list[WindowKey]]:
        share = self.batch_size // (self.processes * self.micro_batches)
        epoch, order = -1, np.empty(0, np.int64)
        for step in self.steps:
            for micro_batch in range(self.micro_batches):
                first = (micro_batch * self.processes + self.process_index) * share
                keys = []
                for sample in range(first, first + share):
                    sample_epoch, place = divmod(step * self.batch_size + sample, self.windows)
                    if sample_epoch != epoch:
                        epoch, order = sample_epoch, self._permutation(sample_epoch)
                    keys.append(WindowKey(int(order[place]), step, sample))
                yield keys

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng(seed_of(self.seed, epoch)).permutation(self.windows)
