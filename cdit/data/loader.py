"""Batches of windows, loaded by worker processes."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from cdit.data.windows import DataConfig, WindowDataset, WindowKey
from cdit.errors import UserError


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stacks items: every tensor gains a leading batch dimension."""
    return default_collate(items)


def loader(dataset: WindowDataset, sampler: Iterable[list[WindowKey]], config: DataConfig) -> "WindowLoader":
    """A loader of the sampler's batches with `config.workers` processes, in pinned memory where there is CUDA."""
    return WindowLoader(
        Reporting(dataset),
        batch_sampler=sampler,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        pin_memory=torch.cuda.is_available(),
        collate_fn=_collate_or_report,
    )


class WindowLoader(DataLoader):
    """A `DataLoader` that raises a worker's `UserError` as it was, without the worker's traceback in its message."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield batch


class Reporting(Dataset):
    """Gives a `UserError` as a value in the item's place."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except UserError as error:
            return error


def _collate_or_report(items: list[dict[str, Tensor] | UserError]) -> dict[str, Tensor] | UserError:
    return next((item for item in items if isinstance(item, UserError)), None) or collate(items)
