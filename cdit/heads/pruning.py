"""How many heads can go? The loss as heads are taken out one after the other, and all stay out."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cdit.common.statistics import Estimate
from cdit.heads.importance import Importance, ImportanceConfig, losses_without
from cdit.heads.intervals import mean_estimates, reporting
from cdit.heads.outputs import head_outputs
from cdit.heads.recording import unwrap
from cdit.world_model import WorldModel


@dataclass
class PruningCurve:
    """The loss on the samples that did not choose the order."""

    counts: list[int]
    """How many heads are out."""
    ordered: list[Estimate]
    """For each count, the loss with the heads out that the other samples found least needed."""
    random: list[Estimate]
    """The loss with as many random heads out, the mean over several orders."""


def pruning_curve(
    world: WorldModel,
    batch: dict[str, Tensor],
    measured: Importance,
    choosing: np.ndarray,
    trajectories: Sequence[Hashable],
    config: ImportanceConfig,
    seed: int,
    points: int = 12,
    random_orders: int = 3,
    progress: bool = False,
) -> PruningCurve:
    """Takes out more and more heads, those first that half of the samples found least needed, and looks at the others.

    Costs (1 + random_orders) · points forward passes for each diffusion time and `batch_size` samples.

    Args:
        world: the model, bare or with a wrapped network.
        batch: stacked items of a `WindowDataset`.
        measured: what `importance` found on this batch.
        choosing: (S,) bool, the samples that make the order, see `cdit.heads.intervals.split_halves`. Means that
            take the place of heads (mode `mean`) are theirs, too.
        trajectories: S names.
        config: that of `importance`.
        seed: of the noise and of the random orders.
        points: how many points the curve has, evenly from no head to all.
        random_orders: with how many the order is compared.
        progress: whether to show a progress bar.
    """
    chosen_by, others = ({name: value[torch.from_numpy(half)] for name, value in batch.items()}
                         for half in (choosing, ~choosing))  # fmt: skip
    means = None
    if config.mode == "mean":
        sites = config.sites(unwrap(world.cdit))
        means = head_outputs(world, chosen_by, sites, config.times, config.batch_size, seed).means
    counts = sorted({round(count) for count in np.linspace(0, len(measured.heads), points)})
    draws = np.random.default_rng(seed)
    shuffled = [draws.permutation(len(measured.heads)) for _ in range(random_orders)]
    orders = [measured.order(choosing), *([measured.heads[i] for i in order] for order in shuffled)]
    variants = [order[:count] for order in orders for count in counts]
    losses = losses_without(world, others, variants, config, seed, means, progress)
    by_order = losses.reshape(-1, len(orders), len(counts))
    names = reporting(trajectories, choosing)
    ordered, random = (mean_estimates(values, names, seed) for values in (by_order[:, 0], by_order[:, 1:].mean(axis=1)))
    return PruningCurve(counts, ordered, random)
