"""Which heads are needed? Heads are ablated: one at a time, and more and more of them at once.

Shapes: S samples, V variants of a network without some heads, H heads of a layer, K width of a head, D model width.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cdit.batch import Batch
from cdit.common.errors import UserError
from cdit.common.frames import to_float
from cdit.common.randomness import generator
from cdit.common.statistics import Estimate
from cdit.evaluate.metrics import Metric
from cdit.heads.choose import mean_estimates, reporting
from cdit.heads.config import ImportanceConfig, Kind, Mode
from cdit.heads.record import Probe, attention_of, evaluating, probes
from cdit.model import CDiT
from cdit.world_model import WorldModel

Site = tuple[int, Kind]
"""One attention of the network: its block, from 0, and its kind."""


class Head(NamedTuple):
    """A head of the network."""

    layer: int
    kind: Kind
    number: int


# ---- taking heads out ----


@contextmanager
def ablate_heads(
    cdit: CDiT, heads: Collection[Head], mode: Mode = "zero", means: dict[Site, Tensor] | None = None
) -> Iterator[None]:
    """The network without some heads, at every call within the context; the model is left as it was.

    Zeroing a head's output is the same as removing its columns of W_O. Contexts may be nested. A compiled copy of the
    model is not affected.

    Args:
        cdit: the network.
        heads: which heads.
        mode: what replaces a head's output: zeros or its mean, which keeps what the head adds regardless of the input.
        means: (H, K) by site, for mode `mean`; see `head_outputs`.

    Raises:
        UserError: a layer or head that the model does not have.
    """
    numbers: dict[Site, list[int]] = defaultdict(list)
    for head in heads:
        numbers[head.layer, head.kind].append(head.number)
    with ExitStack() as stack:
        for site, index in numbers.items():
            attention = attention_of(cdit, *site)
            if not all(0 <= head < attention.heads for head in index):
                raise UserError(f"attention heads {index}: layer {site[0]} has heads 0 to {attention.heads - 1}")
            value = means[site][index] if mode == "mean" else torch.zeros(())
            hook = attention.out.register_forward_pre_hook(partial(_replace, attention.heads, index, value))
            stack.callback(hook.remove)
        yield


def _replace(heads: int, index: list[int], value: Tensor, module: nn.Module, args: tuple[Tensor]) -> Tensor:
    out_BNHK = args[0].unflatten(-1, (heads, -1)).clone()
    out_BNHK[..., index, :] = value.to(out_BNHK)
    return out_BNHK.flatten(-2)


# ---- what heads put out ----


@dataclass
class HeadOutputs:
    """The outputs of heads over S samples."""

    means: dict[Site, Tensor]
    """(H, K) before W_O: means over samples, diffusion times, goals and patches."""
    contributions: dict[Site, np.ndarray]
    """(S, H) root mean square over times, goals and patches of ‖W_O^h · out_h‖, over that of the sum of all heads
    (without W_O's bias). 1 for the only head of a layer; the sum over heads may exceed 1, as heads can cancel."""


def head_outputs(
    world: WorldModel,
    batch: Batch,
    sites: Sequence[Site],
    times: Sequence[float],
    batch_size: int,
    seed: int,
) -> HeadOutputs:
    """Measures what heads put out while the batch's targets are denoised.

    Args:
        world: the model.
        batch: windows of frames.
        sites: which attentions.
        times: diffusion times.
        batch_size: samples per forward pass.
        seed: of the noise.

    Raises:
        UserError: a layer that the model does not have.
    """
    means: dict[Site, Tensor | float] = defaultdict(float)
    squares: dict[Site, Tensor | float] = defaultdict(float)
    gathered: dict[Site, list[Tensor]] = defaultdict(list)

    def note(site: Site, heads: int, module: nn.Linear, args: tuple[Tensor]) -> None:
        out_BHNK = args[0].float().unflatten(-1, (heads, -1)).transpose(1, 2)
        weight = probe.state.batch / (len(batch) * len(times))
        means[site] = means[site] + weight * out_BHNK.mean((0, 2)).cpu()
        # Whether goals are folded into the queries or into the batch, those of a context are adjacent.
        found = contribution_squares(module.weight, out_BHNK).unflatten(0, (probe.state.batch, -1)).sum(1).cpu()
        squares[site] = squares[site] + found

    with evaluating(world), ExitStack() as stack:
        for site in sites:
            attention = attention_of(world.cdit, *site)
            hook = attention.out.register_forward_pre_hook(partial(note, site, attention.heads))
            stack.callback(hook.remove)
        for _, probe in probes(world, batch, batch_size, seed):
            for time in times:
                probe.loss(world, time)
            for site in sites:
                gathered[site].append(squares.pop(site))
    totals = {site: torch.cat(found).double() for site, found in gathered.items()}
    return HeadOutputs(
        dict(means), {site: (total[:, :-1] / total[:, -1:]).sqrt().numpy() for site, total in totals.items()}
    )


def contribution_squares(weight_DD: Tensor, out_BHNK: Tensor) -> Tensor:
    """Sum over queries of ‖W_O^h · out_h‖² of each head, followed by that of all heads together: (B, H + 1)."""
    weight_DHK = weight_DD.float().unflatten(1, (out_BHNK.shape[1], -1))
    total_BND, squares = 0.0, []
    for head, out_BNK in enumerate(out_BHNK.unbind(1)):
        added_BND = out_BNK @ weight_DHK[:, head].T
        squares.append(added_BND.square().sum((1, 2)))
        total_BND = total_BND + added_BND
    return torch.stack([*squares, total_BND.square().sum((1, 2))], dim=1)


# ---- what is lost without them ----


def losses_without(
    world: WorldModel,
    batch: Batch,
    variants: Sequence[Collection[Head]],
    config: ImportanceConfig,
    seed: int,
    means: dict[Site, Tensor] | None = None,
    progress: bool = False,
) -> np.ndarray:
    """The denoising loss without some heads, with the same noise for all variants: (S, V).

    Samples are encoded once for all variants, `batch_size` at a time; each variant then costs one forward pass per
    diffusion time.

    Args:
        world: the model.
        batch: windows of frames.
        variants: the heads to ablate in each.
        config: times, mode and batch size.
        seed: of the noise.
        means: of the heads, for mode `mean`.
        progress: whether to show a progress bar.
    """

    def loss(rows: slice, probe: Probe) -> Tensor:
        return torch.stack([probe.loss(world, time).float().mean(1) for time in config.times]).mean(0)

    return _without(loss, world, batch, variants, config, seed, means, progress)


def distances_without(
    world: WorldModel,
    batch: Batch,
    variants: Sequence[Collection[Head]],
    metric: Metric,
    config: ImportanceConfig,
    seed: int,
    means: dict[Site, Tensor] | None = None,
    progress: bool = False,
) -> np.ndarray:
    """A metric between frames sampled without some heads and the true ones, averaged over goals: (S, V).

    Args:
        world: the model; its own sampler is used.
        batch: windows of frames.
        variants: the heads to ablate in each.
        metric: such as LPIPS, see `cdit.evaluate.metrics`.
        config: mode and batch size.
        seed: of the noise, the same for all variants; a sample's noise depends on `batch_size`.
        means: of the heads, for mode `mean`.
        progress: whether to show a progress bar.
    """

    def distance(rows: slice, probe: Probe) -> Tensor:
        items = batch[rows].to(world.device)
        frames = world.predict(probe.state, items.condition, generator=generator(seed, rows.start))
        truth = to_float(items.target)
        return metric(frames.flatten(0, 1), truth.flatten(0, 1)).unflatten(0, truth.shape[:2]).mean(1)

    return _without(distance, world, batch, variants, config, seed, means, progress)


def _without(
    measure: Callable[[slice, Probe], Tensor],
    world: WorldModel,
    batch: Batch,
    variants: Sequence[Collection[Head]],
    config: ImportanceConfig,
    seed: int,
    means: dict[Site, Tensor] | None,
    progress: bool,
) -> np.ndarray:
    found = np.empty((len(batch), len(variants)))
    with evaluating(world), tqdm(total=found.size, desc="without heads", disable=not progress, leave=False) as bar:
        for rows, probe in probes(world, batch, config.batch_size, seed):
            for i, heads in enumerate(variants):
                with ablate_heads(world.cdit, heads, config.mode, means):
                    found[rows, i] = measure(rows, probe).cpu().numpy()
                bar.update(len(found[rows]))
    return found


@dataclass
class Importance:
    """What is lost without each head, sample by sample."""

    heads: list[Head]
    loss: np.ndarray
    """(S,) of the whole network, averaged over goals and times."""
    loss_rise: np.ndarray
    """(S, heads) loss without the head, minus `loss`."""
    contribution: np.ndarray
    """(S, heads), see `HeadOutputs`."""
    distance_rise: np.ndarray | None
    """(S, heads) distance of sampled frames to the true ones, such as LPIPS, without the head, minus that of the whole
    network; None if not measured."""

    def of(self, layer: int, kind: Kind) -> list[int]:
        """Columns of a layer's heads."""
        return [i for i, head in enumerate(self.heads) if (head.layer, head.kind) == (layer, kind)]

    def order(self, samples: np.ndarray) -> list[Head]:
        """The heads, least needed first, by the mean loss rise over some samples, (S,) bool."""
        return [self.heads[i] for i in np.argsort(self.loss_rise[samples].mean(axis=0), kind="stable")]

    def measures(self, trajectories: Sequence[Hashable], seed: int) -> dict[Head, dict[str, Estimate]]:
        """`loss rise`, `contribution` and, if measured, `LPIPS rise` of each head."""
        values = {"loss rise": self.loss_rise, "contribution": self.contribution}
        if self.distance_rise is not None:
            values["LPIPS rise"] = self.distance_rise
        found = {name: mean_estimates(value, trajectories, seed) for name, value in values.items()}
        return {head: {name: estimates[i] for name, estimates in found.items()} for i, head in enumerate(self.heads)}


def importance(
    world: WorldModel,
    batch: Batch,
    config: ImportanceConfig,
    seed: int,
    metric: Metric | None = None,
    progress: bool = False,
) -> Importance:
    """Ablates each head by itself.

    Costs a forward pass per head, diffusion time and `batch_size` samples and, with a metric, sampling all targets for
    each head.

    Args:
        world: the model.
        batch: windows of frames.
        config: which heads, and how.
        seed: of the noise.
        metric: also compares sampled frames with the true ones, such as LPIPS.
        progress: whether to show progress bars.

    Raises:
        UserError: a layer that the model does not have.
    """
    sites = _sites(world.cdit, config)
    heads = [Head(*site, number) for site in sites for number in range(world.cdit.config.num_heads)]
    outputs = head_outputs(world, batch, sites, config.times, config.batch_size, seed)
    contribution = np.stack([outputs.contributions[head.layer, head.kind][:, head.number] for head in heads], axis=1)
    variants = [(), *((head,) for head in heads)]
    loss = losses_without(world, batch, variants, config, seed, outputs.means, progress)
    distance_rise = None
    if metric is not None:
        found = distances_without(world, batch, variants, metric, config, seed, outputs.means, progress)
        distance_rise = found[:, 1:] - found[:, :1]
    return Importance(heads, loss[:, 0], loss[:, 1:] - loss[:, :1], contribution, distance_rise)


def _sites(cdit: CDiT, config: ImportanceConfig) -> list[Site]:
    layers = range(len(cdit.blocks)) if config.layers is None else config.layers
    return [(layer, kind) for layer in layers for kind in config.kinds]


@dataclass
class PruningCurve:
    """The loss with more and more heads ablated, on the samples that did not choose their order."""

    counts: list[int]
    """Number of ablated heads."""
    ordered: list[Estimate]
    """For each count, the loss without the heads that the other samples need least."""
    random: list[Estimate]
    """The loss without as many random heads, the mean over several orders."""


def pruning_curve(
    world: WorldModel,
    batch: Batch,
    measured: Importance,
    choosing: np.ndarray,
    trajectories: Sequence[Hashable],
    config: ImportanceConfig,
    seed: int,
    points: int = 12,
    random_orders: int = 3,
    progress: bool = False,
) -> PruningCurve:
    """Ablates more and more heads, in the order in which half of the samples need them least, measured on the others.

    Costs (1 + random_orders) · points forward passes per diffusion time and `batch_size` samples.

    Args:
        world: the model.
        batch: windows of frames.
        measured: the result of `importance` on this batch.
        choosing: (S,) bool, the samples that choose the order, see `split_halves`; also those of the means for mode
            `mean`.
        trajectories: S names.
        config: that of `importance`.
        seed: of the noise and of the random orders.
        points: of the curve, evenly spaced from no head to all.
        random_orders: number of random orders to compare with.
        progress: whether to show a progress bar.
    """
    chosen_by, others = (batch[torch.from_numpy(half)] for half in (choosing, ~choosing))
    means = None
    if config.mode == "mean":
        sites = _sites(world.cdit, config)
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
