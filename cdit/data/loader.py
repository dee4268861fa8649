"""Batches of windows, loaded by worker processes."""

import atexit
import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import connection
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cdit.batch import Batch
from cdit.common.errors import DataError, Interrupted, UserError
from cdit.data.config import DataConfig
from cdit.data.prefetch import fetching_ahead
from cdit.data.sampler import KeyedBatchSampler
from cdit.data.windows import WindowDataset, WindowKey

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Which loader workers leave to the process that they work for."""
SUBSTITUTES = 20
"""How many windows are tried in place of one that cannot be read."""


def loader(dataset: WindowDataset, sampler: KeyedBatchSampler, config: DataConfig) -> "WindowLoader":
    """A loader of the sampler's batches with `config.workers` processes, in pinned memory where there is CUDA.

    Shards from afar are fetched before they are needed.

    Where `config.on_error` is "skip", a sample that cannot be read has weight 0, another window's content, and a
    message in the batch's `skipped`.
    """
    return WindowLoader(
        Reporting(Skipping(dataset) if config.on_error == "skip" else dataset),
        batch_sampler=fetching_ahead(sampler, dataset),
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        pin_memory=torch.cuda.is_available(),
        collate_fn=_collate_or_report,
    )


class WindowLoader(DataLoader):
    """A `DataLoader` whose workers fail in plain words.

    Raises a worker's `UserError` or `Interrupted` as it was, without the worker's traceback in its message; raises
    `Interrupted` where a worker was killed. Workers leave signals that stop a run to the process they work for: such
    signals often go to all processes of a run at once, and it still needs them to finish its step.
    """

    def __iter__(self) -> Iterator[Batch]:
        # Torch would have a signal handler raise where a worker dies, wherever the main process is just then. That a
        # worker is missing is noticed without it, within seconds of waiting for its batch.
        handler, children = signal.getsignal(signal.SIGCHLD), set(multiprocessing.active_children())
        admitted = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # which workers inherit
        try:
            batches = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, admitted)
        if signal.getsignal(signal.SIGCHLD) is not handler:
            signal.signal(signal.SIGCHLD, handler)
        workers = set(multiprocessing.active_children()) - children
        for worker in workers:
            atexit.register(worker.kill)  # Python ends its children with the SIGTERM that these do not take
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:  # of the wait, or of a batch it could not hand over
                if not connection.wait([worker.sentinel for worker in workers], timeout=1):
                    raise
                reason = str(error) or type(error).__name__
                raise Interrupted(
                    f"a loader worker was killed ({reason}); `--resume auto` continues. Where memory was short, take "
                    "fewer data.workers or a smaller data.cache_gb"
                ) from error
            if isinstance(batch, Exception):
                try:
                    raise batch
                finally:
                    del batch  # or its traceback would keep it, and with it the workers
            yield batch


class Reporting(Dataset):
    """Gives a `UserError` or `Interrupted` as a value in the item's place."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except (UserError, Interrupted) as error:
            return error


class Skipping(Dataset):
    """Windows, and in place of one that cannot be read another, with weight 0 and what was wrong as `skipped`.

    The substitutes come after the window at distances that grow by a factor, from 1 to about the whole dataset: one is
    close by where a frame is broken, and farther away where a whole trajectory is.
    """

    def __init__(self, dataset: WindowDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: WindowKey) -> Batch:
        try:
            return self.dataset[key]
        except DataError as error:
            first = error
        for distance in np.geomspace(1, len(self), SUBSTITUTES, endpoint=False):
            try:
                item = self.dataset[key._replace(window=(key.window + int(distance)) % len(self), weight=0.0)]
            except DataError:
                continue
            return replace(item, skipped=[str(first)]) if key.weight else item  # padding has weight 0 in any case
        raise first


def _collate_or_report(items: list[Batch | Exception]) -> Batch | Exception:
    return next((item for item in items if isinstance(item, Exception)), None) or Batch.collate(items)


collate = Batch.collate
