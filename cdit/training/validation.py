"""Denoising loss on held-out windows: always the same windows, goals, noise and diffusion times."""

import math

import torch
from accelerate import Accelerator
from torch import nn

from cdit.batch import Batch, KeyedDraws
from cdit.common.randomness import generator
from cdit.data.windows import WindowDataset, WindowKey
from cdit.training.config import ValidationConfig
from cdit.world_model import WorldModel

CHUNK = 32  # windows per forward pass


class Validation:
    """The held-out windows of a run.

    Diffusion times are evenly spaced over (0, 1), so that every bin holds the same number.
    """

    def __init__(self, dataset: WindowDataset, config: ValidationConfig, seed: int):
        self.dataset, self.bins, goals = dataset, config.time_bins, dataset.config.goals
        draws = generator(seed, 0)
        windows = torch.randperm(len(dataset), generator=draws)[: config.samples].tolist()
        self.keys = [WindowKey(window, 0, i) for i, window in enumerate(windows)]
        order = torch.randperm(len(windows) * goals, generator=draws)
        self.times = ((order + 0.5) / len(order)).reshape(len(windows), goals)

    @torch.no_grad()
    def run(self, world: WorldModel, network: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """The mean loss, overall and per bin of diffusion time. Every process must call it."""
        sums = torch.zeros(2, self.bins, dtype=torch.float64)  # on the CPU: not every device has float64
        # With sharded weights, all processes must call the network equally often: shorter shares are padded with the
        # first window, with weight zero.
        processes, windows = accelerator.num_processes, len(self.keys)
        mine = range(accelerator.process_index, processes * math.ceil(windows / processes), processes)
        for start in range(0, len(mine), CHUNK):
            places = mine[start : start + CHUNK]
            chosen = [place if place < windows else 0 for place in places]
            counted = torch.tensor([place < windows for place in places]).double()[:, None]
            windows_here = Batch.collate([self.dataset[self.keys[i]] for i in chosen])
            draws = KeyedDraws(windows_here.key, accelerator.device)
            times = self.times[chosen].to(accelerator.device)
            loss = world.objective.loss(network, world.encode(windows_here), draws, times).float().cpu().double()
            bins = (self.times[chosen] * self.bins).long().clamp(max=self.bins - 1).flatten()
            sums[0].index_add_(0, bins, (counted * loss).flatten())
            sums[1].index_add_(0, bins, counted.expand_as(loss).flatten())
        sums = accelerator.reduce(sums.to(accelerator.device, torch.float32), "sum").cpu().double()
        named = {}
        for i, (total, count) in enumerate(sums.T.tolist()):
            if count:
                named[f"validation/loss_t{i / self.bins:.2f}-{(i + 1) / self.bins:.2f}"] = total / count
        return {"validation/loss": float(sums[0].sum() / sums[1].sum()), **named}
