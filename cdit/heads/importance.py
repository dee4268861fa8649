"""Which heads are needed? Heads are ablated: one at a time, and more and more of them at once.

Shapes: S samples, V variants of a network without some heads, H heads of a layer, K width of a head, D model width.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
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
        mode: what replaces a head's output: zeros or its mean, which keeps what the head adds regardless of the input.
        means: (H, K) by site, for mode `mean`; see `Ablation.means`.

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


# ---- what is measured without them ----


@dataclass
class Ablation:
    """Denoises and samples a batch without some heads."""

    world: WorldModel
    batch: Batch
    """S windows of frames."""
    config: ImportanceConfig
    seed: int
    """Of the noise, which is the same for all variants."""
    progress: bool = False
    means: dict[Site, Tensor] | None = None
    """(H, K) outputs of heads before W_O, for mode `mean`: means over samples, diffusion times, goals and patches."""

    @property
    def sites(self) -> list[Site]:
        """The attentions of the config."""
        layers = range(len(self.world.cdit.blocks)) if self.config.layers is None else self.config.layers
        return [(layer, kind) for layer in layers for kind in self.config.kinds]

    def losses(self, variants: Sequence[Collection[Head]]) -> np.ndarray:
        """The denoising loss without the heads of each variant: (S, V), averaged over goals and times.

        Samples are encoded once for all variants, which cost one forward pass per diffusion time and `batch_size`
        samples each.
        """

        def loss(rows: slice, probe: Probe) -> Tensor:
            return torch.stack([probe.loss(self.world, time).float().mean(1) for time in self.config.times]).mean(0)

        return self._each(variants, loss)

    def distances(self, variants: Sequence[Collection[Head]], metric: Metric) -> np.ndarray:
        """A metric, such as LPIPS, between frames sampled without the heads and the true ones: (S, V).

        It is averaged over goals. A sample's noise depends on `batch_size`.
        """

        def distance(rows: slice, probe: Probe) -> Tensor:
            items = self.batch[rows].to(self.world.device)
            frames = self.world.predict(probe.state, items.condition, generator=generator(self.seed, rows.start))
            truth = to_float(items.target)
            return metric(frames.flatten(0, 1), truth.flatten(0, 1)).unflatten(0, truth.shape[:2]).mean(1)

        return self._each(variants, distance)

    def _each(self, variants: Sequence[Collection[Head]], measure: Callable[[slice, Probe], Tensor]) -> np.ndarray:
        found = np.empty((len(self.batch), len(variants)))
        bar = tqdm(total=found.size, desc="without heads", disable=not self.progress, leave=False)
        with evaluating(self.world), bar:
            for rows, probe in probes(self.world, self.batch, self.config.batch_size, self.seed):
                for i, heads in enumerate(variants):
                    with ablate_heads(self.world.cdit, heads, self.config.mode, self.means):
                        found[rows, i] = measure(rows, probe).cpu().numpy()
                    bar.update(len(found[rows]))
        return found

    def outputs(self) -> dict[Site, np.ndarray]:
        """Sets `means`, and returns by site the contributions of its heads, (S, H).

        A contribution is the root mean square over times, goals and patches of ‖W_O^h · out_h‖, over that of the sum of
        all heads (without W_O's bias). 1 for the only head of a layer; their sum may exceed 1, as heads can cancel.
        """
        times, means = self.config.times, defaultdict(float)
        squares: dict[Site, Tensor | float] = defaultdict(float)
        gathered: dict[Site, list[Tensor]] = defaultdict(list)

        def note(site: Site, heads: int, module: nn.Linear, args: tuple[Tensor]) -> None:
            out_BHNK = args[0].float().unflatten(-1, (heads, -1)).transpose(1, 2)
            contexts = probe.state.batch
            means[site] = means[site] + contexts / (len(self.batch) * len(times)) * out_BHNK.mean((0, 2)).cpu()
            # Whether goals are folded into the queries or into the batch, those of a context are adjacent.
            found = contribution_squares(module.weight, out_BHNK).unflatten(0, (contexts, -1)).sum(1).cpu()
            squares[site] = squares[site] + found

        with evaluating(self.world), ExitStack() as stack:
            for site in self.sites:
                attention = attention_of(self.world.cdit, *site)
                hook = attention.out.register_forward_pre_hook(partial(note, site, attention.heads))
                stack.callback(hook.remove)
            for _, probe in probes(self.world, self.batch, self.config.batch_size, self.seed):
                for time in times:
                    probe.loss(self.world, time)
                for site in self.sites:
                    gathered[site].append(squares.pop(site))
        self.means = dict(means)
        totals = {site: torch.cat(found).double() for site, found in gathered.items()}
        return {site: (total[:, :-1] / total[:, -1:]).sqrt().numpy() for site, total in totals.items()}


def contribution_squares(weight_DD: Tensor, out_BHNK: Tensor) -> Tensor:
    """Sum over queries of ‖W_O^h · out_h‖² of each head, followed by that of all heads together: (B, H + 1)."""
    weight_DHK = weight_DD.float().unflatten(1, (out_BHNK.shape[1], -1))
    total_BND, squares = 0.0, []
    for head, out_BNK in enumerate(out_BHNK.unbind(1)):
        added_BND = out_BNK @ weight_DHK[:, head].T
        squares.append(added_BND.square().sum((1, 2)))
        total_BND = total_BND + added_BND
    return torch.stack([*squares, total_BND.square().sum((1, 2))], dim=1)


# ---- what that says ----


@dataclass
class Importance:
    """What is lost without each head, sample by sample."""

    heads: list[Head]
    loss: np.ndarray
    """(S,) of the whole network, averaged over goals and times."""
    loss_rise: np.ndarray
    """(S, heads) loss without the head, minus `loss`."""
    contribution: np.ndarray
    """(S, heads), see `Ablation.outputs`."""
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


def importance(ablation: Ablation, metric: Metric | None = None) -> Importance:
    """Ablates each head by itself.

    Costs a forward pass per head, diffusion time and `batch_size` samples and, with a metric of sampled and true frames
    such as LPIPS, sampling all targets for each head.

    Raises:
        UserError: a layer that the model does not have.
    """
    contributions = ablation.outputs()
    heads = [Head(*site, number) for site, found in contributions.items() for number in range(found.shape[1])]
    contribution = np.concatenate(list(contributions.values()), axis=1)
    variants = [(), *((head,) for head in heads)]
    loss = ablation.losses(variants)
    distance_rise = None
    if metric is not None:
        found = ablation.distances(variants, metric)
        distance_rise = found[:, 1:] - found[:, :1]
    return Importance(heads, loss[:, 0], loss[:, 1:] - loss[:, :1], contribution, distance_rise)


@dataclass
class PruningCurve:
    """The loss with more and more heads ablated, on the samples that did not choose their order."""

    counts: list[int]
    ordered: list[Estimate]
    """For each count, the loss without the heads that the other samples need least."""
    random: list[Estimate]
    """The loss without the same number of random heads, averaged over several orders."""


def pruning_curve(
    ablation: Ablation,
    measured: Importance,
    choosing: np.ndarray,
    trajectories: Sequence[Hashable],
    points: int = 12,
    random_orders: int = 3,
) -> PruningCurve:
    """Ablates more and more heads, in the order in which half of the samples need them least, measured on the others.

    Costs (1 + random_orders) · points forward passes per diffusion time and `batch_size` samples.

    Args:
        choosing: (S,) bool, the samples that choose the order, see `split_halves`; also those of the means for mode
            `mean`.
        trajectories: S names.
        points: of the curve, evenly spaced from no head to all.
    """
    chosen_by, others = (replace(ablation, batch=ablation.batch[torch.from_numpy(x)]) for x in (choosing, ~choosing))
    if ablation.config.mode == "mean":
        chosen_by.outputs()
        others.means = chosen_by.means
    counts = sorted({round(count) for count in np.linspace(0, len(measured.heads), points)})
    draws = np.random.default_rng(ablation.seed)
    shuffled = [draws.permutation(len(measured.heads)) for _ in range(random_orders)]
    orders = [measured.order(choosing), *([measured.heads[i] for i in order] for order in shuffled)]
    losses = others.losses([order[:count] for order in orders for count in counts])
    by_order, names = losses.reshape(-1, len(orders), len(counts)), reporting(trajectories, choosing)
    means = (by_order[:, 0], by_order[:, 1:].mean(axis=1))
    return PruningCurve(counts, *(mean_estimates(values, names, ablation.seed) for values in means))
