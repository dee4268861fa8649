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
"""Signals that loader workers leave to the process they work for."""
SUBSTITUTES = 20
"""How many substitutes are tried for a window that cannot be read."""


def loader(dataset: WindowDataset, sampler: KeyedBatchSampler, config: DataConfig) -> "WindowLoader":
    """A loader of the sampler's batches with `config.workers` processes, in pinned memory if CUDA is available.

    Remote shards are downloaded before they are needed.

    If `config.on_error` is "skip", a sample that cannot be read has weight 0, the content of another window, and a
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
    """A `DataLoader` with clear errors from workers.

    Raises a worker's `UserError` or `Interrupted` unchanged, without the worker's traceback in its message; raises
    `Interrupted` if a worker was killed. Workers ignore signals that stop a run: such signals often go to all processes
    of a run at once, and the main process still needs the workers to finish its step.
    """

    def __iter__(self) -> Iterator[Batch]:
        # Torch's signal handler would raise wherever the main process is when a worker dies. Without it, a missing
        # worker is noticed within seconds of waiting for its batch.
        handler, children = signal.getsignal(signal.SIGCHLD), set(multiprocessing.active_children())
        admitted = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # workers inherit this
        try:
            batches = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, admitted)
        if signal.getsignal(signal.SIGCHLD) is not handler:
            signal.signal(signal.SIGCHLD, handler)
        workers = set(multiprocessing.active_children()) - children
        for worker in workers:
            atexit.register(worker.kill)  # Python ends its children with SIGTERM, which these ignore
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:  # while waiting, or for a batch that it could not send
                if not connection.wait([worker.sentinel for worker in workers], timeout=1):
                    raise
                reason = str(error) or type(error).__name__
                raise Interrupted(
                    f"a loader worker was killed ({reason}); `--resume auto` continues. If it ran out of memory, use "
                    "fewer data.workers or a smaller data.cache_gb"
                ) from error
            if isinstance(batch, Exception):
                try:
                    raise batch
                finally:
                    del batch  # otherwise its traceback would keep it, and with it the workers, alive
            yield batch


class Reporting(Dataset):
    """Returns a `UserError` or `Interrupted` in place of the item."""

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
    """Windows, with substitutes of weight 0 for those that cannot be read, and the reason in `skipped`.

    Substitutes follow the window at distances that grow geometrically, from 1 to about the whole dataset: a near one
    suffices if a frame is damaged, a farther one if a whole trajectory is.
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
            return replace(item, skipped=[str(first)]) if key.weight else item  # padding already has weight 0
        raise first


def _collate_or_report(items: list[Batch | Exception]) -> Batch | Exception:
    return next((item for item in items if isinstance(item, Exception)), None) or Batch.collate(items)
