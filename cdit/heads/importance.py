"""How much does each head matter? What is lost without it, and how much it adds.

Shapes: S samples of a probe batch, V variants of a network that lack heads.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cdit.common.pictures import to_float
from cdit.common.randomness import generator
from cdit.diffusion import SamplerConfig
from cdit.evaluate.metrics import Metric
from cdit.heads.ablate import Mode, Site, ablate_heads
from cdit.heads.config import Kind
from cdit.heads.denoising import encoded_batches, evaluating
from cdit.heads.outputs import head_outputs
from cdit.heads.recording import unwrap
from cdit.model import CDiT
from cdit.world_model import WorldModel


class Head(NamedTuple):
    """A head of the network."""

    layer: int
    kind: Kind
    number: int


@dataclass
class ImportanceConfig:
    """How the importance of heads is measured."""

    layers: list[int] | None = None
    """Blocks, from 0; by default all."""
    kinds: list[Kind] = field(default_factory=lambda: ["cross", "self"])
    """Which attentions."""
    mode: Mode = "zero"
    """What takes the place of a head's output: zeros, or its mean over the probe set."""
    times: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])
    """Diffusion times at which the loss is measured; it is averaged over them."""
    batch_size: int = 8
    """Samples in a forward pass."""

    def sites(self, cdit: CDiT) -> list[Site]:
        """The attentions that are meant."""
        layers = range(len(cdit.blocks)) if self.layers is None else self.layers
        return [(layer, kind) for layer in layers for kind in self.kinds]

    def heads(self, cdit: CDiT) -> list[Head]:
        """All heads of these attentions."""
        return [Head(*site, number) for site in self.sites(cdit) for number in range(cdit.config.num_heads)]


@dataclass
class Importance:
    """What is lost without each head, sample by sample."""

    heads: list[Head]
    loss: np.ndarray
    """(S,) of the whole network, the mean over goals and times."""
    loss_rise: np.ndarray
    """(S, heads) loss without the head, less `loss`."""
    contribution: np.ndarray
    """(S, heads), see `cdit.heads.outputs.HeadOutputs`."""
    distance: np.ndarray | None
    """(S,) such as LPIPS, of sampled frames to the true ones, the mean over goals; None where it was not measured."""
    distance_rise: np.ndarray | None
    """(S, heads) that without the head, less `distance`."""

    def of(self, layer: int, kind: Kind) -> list[int]:
        """Columns of a layer's heads: `best_head(loss_rise[:, columns], …)` is its most needed."""
        return [i for i, head in enumerate(self.heads) if (head.layer, head.kind) == (layer, kind)]

    def order(self, samples: np.ndarray) -> list[Head]:
        """The heads, least needed first, by the mean loss rise over some samples, (S,) bool."""
        return [self.heads[i] for i in np.argsort(self.loss_rise[samples].mean(axis=0), kind="stable")]


def losses_without(
    world: WorldModel,
    batch: dict[str, Tensor],
    variants: Sequence[Collection[Head]],
    config: ImportanceConfig,
    seed: int,
    means: dict[Site, Tensor] | None = None,
    progress: bool = False,
) -> np.ndarray:
    """The denoising loss without some heads, with the same noise for all variants: (S, V).

    Samples are encoded once for all variants, `batch_size` of them at a time; each variant then costs one forward pass
    for each diffusion time.

    Args:
        world: the model, bare or with a wrapped network.
        batch: stacked items of a `WindowDataset`.
        variants: for each, the heads that are out.
        config: times, mode, and how many samples at once.
        seed: of the noise.
        means: of the heads, for mode `mean`.
        progress: whether to show a progress bar.
    """
    losses = np.empty((len(batch["target"]), len(variants)))
    with evaluating(world), tqdm(total=losses.size, desc="without heads", disable=not progress, leave=False) as bar:
        for rows, encoded in encoded_batches(world, batch, config.batch_size, seed):
            for i, heads in enumerate(variants):
                with ablate_heads(world.cdit, _by_site(heads), config.mode, means):
                    found = [encoded.loss(world, time).float().mean(1) for time in config.times]
                losses[rows, i] = torch.stack(found).mean(0).cpu().numpy()
                bar.update(len(losses[rows]))
    return losses


def distances_without(
    world: WorldModel,
    batch: dict[str, Tensor],
    variants: Sequence[Collection[Head]],
    metric: Metric,
    config: ImportanceConfig,
    seed: int,
    means: dict[Site, Tensor] | None = None,
    sampler: SamplerConfig | None = None,
    progress: bool = False,
) -> np.ndarray:
    """A metric of frames sampled without some heads against the true ones, the mean over goals: (S, V).

    Args:
        world: the model, bare or with a wrapped network.
        batch: stacked items of a `WindowDataset`.
        variants: for each, the heads that are out.
        metric: such as LPIPS, see `cdit.evaluate.metrics`.
        config: mode, and how many samples at once.
        seed: of the noise, the same for all variants; which noise a sample gets depends on `batch_size`.
        means: of the heads, for mode `mean`.
        sampler: scheduler, steps and guidance; by default those of training.
        progress: whether to show a progress bar.
    """
    distances = np.empty((len(batch["target"]), len(variants)))
    plain = WorldModel(unwrap(world.cdit), world.codec, world.description)
    with evaluating(world), tqdm(total=distances.size, desc="sampling", disable=not progress, leave=False) as bar:
        for rows, encoded in encoded_batches(world, batch, config.batch_size, seed):
            device = encoded.clean.device
            items = {name: value[rows].to(device) for name, value in batch.items()}
            truth = to_float(items["target"])
            for i, heads in enumerate(variants):
                with ablate_heads(plain.cdit, _by_site(heads), config.mode, means):
                    frames = plain.predict(
                        encoded.cache,
                        items["action"],
                        items["time_shift"],
                        action_mask=items["action_mask"],
                        spacing=items["spacing"],
                        sampler=sampler,
                        generator=generator(seed, rows.start),
                    )
                found = metric(frames.flatten(0, 1), truth.flatten(0, 1)).unflatten(0, truth.shape[:2])
                distances[rows, i] = found.mean(1).cpu().numpy()
                bar.update(len(truth))
    return distances


def importance(
    world: WorldModel,
    batch: dict[str, Tensor],
    config: ImportanceConfig,
    seed: int,
    metric: Metric | None = None,
    sampler: SamplerConfig | None = None,
    progress: bool = False,
) -> Importance:
    """Takes out each head by itself.

    Costs a forward pass for each head, diffusion time and `batch_size` samples, and, with a metric, the sampling of all
    targets for each head.

    Args:
        world: the model, bare or with a wrapped network.
        batch: stacked items of a `WindowDataset`.
        config: which heads, and how.
        seed: of the noise.
        metric: also measures sampled frames, such as by LPIPS.
        sampler: of these frames; by default that of training.
        progress: whether to show progress bars.

    Raises:
        UserError: a layer that the model does not have.
    """
    cdit = unwrap(world.cdit)
    heads = config.heads(cdit)
    outputs = head_outputs(world, batch, config.sites(cdit), config.times, config.batch_size, seed)
    contribution = np.stack([outputs.contributions[head.layer, head.kind][:, head.number] for head in heads], axis=1)
    variants = [(), *((head,) for head in heads)]
    loss = losses_without(world, batch, variants, config, seed, outputs.means, progress)
    distance = distance_rise = None
    if metric is not None:
        found = distances_without(world, batch, variants, metric, config, seed, outputs.means, sampler, progress)
        distance, distance_rise = found[:, 0], found[:, 1:] - found[:, :1]
    return Importance(heads, loss[:, 0], loss[:, 1:] - loss[:, :1], contribution, distance, distance_rise)


def _by_site(heads: Collection[Head]) -> dict[Site, list[int]]:
    sites: dict[Site, list[int]] = defaultdict(list)
    for head in heads:
        sites[head.layer, head.kind].append(head.number)
    return sites
