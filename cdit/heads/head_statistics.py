"""The measures of every head over a set of samples, gathered sample by sample so that no attention weights are kept."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cdit.batch import Batch
from cdit.common.frames import to_float
from cdit.common.statistics import Estimate
from cdit.heads import measures
from cdit.heads.choose import mean_estimates, trends
from cdit.heads.config import Kind
from cdit.heads.correspondence import correspondence_score
from cdit.heads.glossary import HeadType, head_type
from cdit.heads.measures import Layout
from cdit.heads.record import LayerAttention, evaluating, probes, watch_attention
from cdit.world_model import WorldModel


@dataclass
class HeadRow:
    """The measures of one head at one diffusion time."""

    kind: Kind
    layer: int
    head: int
    time: float
    measures: dict[str, Estimate]
    """By name: means over samples of means over goals and target patches; the preferred offset and its share of the
    mass on past frames; how the attention moves with turns and steps. Names of value-weighted measures begin with
    `moved`."""
    type: HeadType


@dataclass
class _Sums:
    """Of one layer at one time."""

    values: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Per sample, (H,) by measure."""
    motions: dict[int, Tensor] = field(default_factory=dict)
    """Per sample, (H, G, 2): the column translation and the divergence in the newest frame."""
    hits: dict[int, Tensor] = field(default_factory=dict)
    """Per sample, (H, N): of how many goals the head's largest weight is on a true place of the patch."""
    offsets: Tensor | float = 0.0
    distances: Tensor | float = 0.0
    calls: int = 0
    """Of `add`; more than samples if the objective calls the network several times."""


class HeadStatistics:
    """Gathers the measures of one kind of attention.

        statistics = HeadStatistics("cross", layout, trajectories, edges, actions)
        for sample …, time …:
            with watch_attention(cdit, layers, kind, lambda layer: statistics.add(sample, time, layer)):
                cdit(…)  # with that sample alone

    Args:
        layout: of the tokens attended to: the past frames; for self-attention, one frame.
        trajectories: S names; intervals are bootstrapped over them.
        edges: (S, T, N) `edge_patches` of the past frames; for self-attention (S, G, 1, 1, N) of the targets. The edge
            lift is relative to their mean over the samples.
        actions: (S, G, 3) motion from the newest past frame to each target: dx, dy in metres, dyaw in radians. None for
            self-attention and if motions are unknown.
        truth: (S, G, N, M) bool, `true_tokens`; None if unknown.
    """

    def __init__(
        self,
        kind: Kind,
        layout: Layout,
        trajectories: Sequence[Hashable],
        edges: Tensor,
        actions: Tensor | None = None,
        truth: Tensor | None = None,
        seed: int = 0,
    ):
        self.kind, self.layout, self.trajectories, self.seed = kind, layout, list(trajectories), seed
        self._edges, self._chance = edges, edges.mean(0)
        self._actions, self._truth = actions, truth
        self._sums: dict[tuple[int, float], _Sums] = defaultdict(_Sums)

    @torch.no_grad()
    def add(self, sample: int, time: float, attention: LayerAttention) -> None:
        """Measures one layer's attention of one sample."""
        sums = self._sums[attention.layer, time]
        weights = attention.weights()[0]  # (G, H, N, M[+1])
        scores = attention.scores()[0]
        found = {"score range": measures.score_range(scores), **self._measure(weights, sample)}
        found["effective share"] = found["effective tokens"] / scores.isfinite().sum(-1)
        del scores
        norms = measures.value_norms(attention.values()[0], attention.output_maps())
        moved = self._measure(measures.value_weighted(weights, norms), sample)
        found |= {f"moved {name}": value for name, value in moved.items()}
        means = torch.stack([value.transpose(0, 1).flatten(1).nanmean(1) for value in found.values()]).cpu()
        sums.values[sample] = dict(zip(found, means, strict=True))
        if self._truth is not None:
            truth = self._truth[sample, :, None].to(weights.device)
            score = correspondence_score(weights, truth, self.layout).sum(0)
            sums.values[sample] |= score.ratios()
            sums.hits[sample] = score.hits
        sums.offsets = sums.offsets + measures.offset_mass(weights, self.layout).mean(0).cpu()
        sums.distances = sums.distances + measures.head_distances(weights).mean(0).cpu()
        sums.calls += 1
        if self._actions is not None:
            motion = measures.fit_motion(measures.offset_fields(weights, self.layout), self.layout)
            newest = torch.stack((motion.translation[..., -1, 1], motion.divergence[..., -1]), dim=-1)
            sums.motions[sample] = newest.transpose(0, 1).cpu()

    @property
    def measures(self) -> list[str]:
        """Names that `values` accepts."""
        sums = next(iter(self._sums.values()))
        return list(next(iter(sums.values.values())))

    def values(self, measure: str) -> tuple[np.ndarray, list[str]]:
        """A measure of each sample and head at each time, (S, C), and the name of each column."""
        columns, names = [], []
        for (layer, time), sums in sorted(self._sums.items()):
            found = torch.stack([sums.values[sample][measure] for sample in range(len(self.trajectories))])
            columns.append(found.double().numpy())
            names += [f"layer {layer}, head {head}, t = {time:g}" for head in range(found.shape[1])]
        return np.concatenate(columns, axis=1), names

    def hits(self, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """By target patch, in how many goals of these samples the largest weight is on a true place.

        Returns:
            (C, rows, columns), with the columns C of `values`; and in how many of these goals any past frame shows the
            patch, (rows, columns). Their ratio is the accuracy.
        """
        hits = torch.cat([sum(sums.hits[sample] for sample in samples) for _, sums in sorted(self._sums.items())])
        visible = self._truth[samples].any(-1).sum((0, 1)).cpu()
        return hits.unflatten(-1, self.layout[1:]), visible.unflatten(-1, self.layout[1:])

    def distances(self) -> dict[tuple[int, float], Tensor]:
        """By layer and time, the mean `head_distances` over samples and goals, (H, H)."""
        return {key: sums.distances / sums.calls for key, sums in sorted(self._sums.items())}

    def rows(self) -> list[HeadRow]:
        """One row for each layer, time and head, in this order."""
        return [row for key in sorted(self._sums) for row in self._rows(*key)]

    def _measure(self, weights: Tensor, sample: int) -> dict[str, Tensor]:
        """Measures of weights (G, H, N, M[+1]), each (G, H, N)."""
        frames = self.layout.frames
        edges, chance = self._edges[sample].to(weights.device), self._chance.to(weights.device)
        masses = measures.frame_mass(weights, self.layout).unbind(-1)
        entropy = measures.entropy(weights)
        found = {
            "entropy": entropy,
            "effective tokens": entropy.exp(),
            "distance": measures.mean_distance(weights, self.layout),
            "same place": measures.same_place_share(weights, self.layout),
            "edge lift": measures.edge_lift(weights, edges, self.layout, chance),
            **{f"mass frame {i + 1 - frames}": mass for i, mass in enumerate(masses)},
        }
        if weights.shape[-1] > frames * self.layout.patches:
            found["mass extra"] = measures.extra_share(weights, self.layout)
        return found

    def _rows(self, layer: int, time: float) -> list[HeadRow]:
        sums = self._sums[layer, time]
        samples = sorted(sums.values)
        trajectories = [self.trajectories[sample] for sample in samples]
        names = list(sums.values[samples[0]])
        values = torch.stack([torch.stack([sums.values[sample][name] for name in names]) for sample in samples])
        heads = values.shape[-1]
        estimated = mean_estimates(values.flatten(1).double().numpy(), trajectories, self.seed)
        offset_maps = sums.offsets / sums.calls
        offsets = measures.largest_offset(offset_maps, self.layout).tolist()
        offset_shares = (offset_maps.amax((-2, -1)) / offset_maps.sum((-2, -1))).tolist()
        rows = []
        for head in range(heads):
            found = dict(zip(names, estimated[head::heads], strict=True))
            offset = {"rows": offsets[head][0], "columns": offsets[head][1], "share": offset_shares[head]}
            found |= {f"offset {name}": Estimate(value, None, None) for name, value in offset.items()}
            if sums.motions:
                found |= self._trends(sums, head)
            kind = head_type({name: estimate.mean for name, estimate in found.items()})
            rows.append(HeadRow(self.kind, layer, head, time, found, kind))
        return rows

    def _trends(self, sums: _Sums, head: int) -> dict[str, Estimate]:
        """How the newest frame's column translation changes with dyaw, and its divergence with dx."""
        samples = sorted(sums.motions)
        goals = self._actions.shape[1]
        motion = torch.stack([sums.motions[sample][head] for sample in samples]).flatten(0, 1).double().numpy()
        factors = self._actions[samples].flatten(0, 1).double().cpu().numpy()
        names = [self.trajectories[sample] for sample in samples for _ in range(goals)]
        found = {}
        for name, values, factor in (("turning", motion[:, 0], 2), ("walking", motion[:, 1], 0)):
            trend = trends(values, factors, names, self.seed)[factor]
            found |= {f"{name} slope": trend.slope, f"{name} correlation": Estimate(trend.correlation, None, None)}
        return found


def measure_heads(
    world: WorldModel,
    batch: Batch,
    trajectories: Sequence[Hashable],
    times: Sequence[float],
    seed: int,
    kind: Kind = "cross",
    layers: Sequence[int] | None = None,
    truth: Tensor | None = None,
    watch: Callable[[int, float, LayerAttention], None] | None = None,
    progress: bool = False,
) -> HeadStatistics:
    """Measures the heads while the samples' targets, noised to chosen diffusion times, are denoised.

    Args:
        batch: S windows of frames.
        trajectories: S names, over which intervals are bootstrapped.
        truth: for cross-attention, (S, G, N, M) bool, `true_tokens`, if known.
        watch: also called with the sample's index, the diffusion time and each layer's attention as it runs.

    Raises:
        UserError: a layer that the model does not have.
    """
    cdit = world.cdit
    layers = range(len(cdit.blocks)) if layers is None else layers
    context, condition = batch.context[:, -cdit.config.max_context :], batch.condition
    layout = Layout(context.shape[1] if kind == "cross" else 1, *cdit.grid)
    attended = context if kind == "cross" else batch.target
    edges = measures.edge_patches(measures.gradient_magnitude(to_float(attended), layout))
    moving = world.description.has_actions and world.description.actions.kind == "motion"
    known = moving and (condition.known is None or bool(condition.known.all()))
    actions = condition.action if kind == "cross" and known else None
    statistics = HeadStatistics(
        kind, layout, trajectories, edges if kind == "cross" else edges[:, :, None, None], actions, truth, seed
    )
    each = probes(world, batch, 1, seed)  # one by one, so that one sample's weights are held at most
    with evaluating(world):
        for rows, probe in tqdm(each, f"{kind}-attention", len(batch), leave=False, disable=not progress):
            for time in times:

                def note(attention: LayerAttention, sample: int = rows.start, time: float = time) -> None:
                    statistics.add(sample, time, attention)
                    if watch is not None:
                        watch(sample, time, attention)

                with watch_attention(cdit, layers, kind, note):
                    probe.loss(world, time)
    return statistics
