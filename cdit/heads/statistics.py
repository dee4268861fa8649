"""The measures of every head over a probe set. Layers' attention comes one sample and one time after the other, and no
weights are kept.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cdit.common.statistics import Estimate
from cdit.heads import measures
from cdit.heads.correspondence import CorrespondenceScore, correspondence_score
from cdit.heads.directions import Trend, fit_motion, offset_fields, trends
from cdit.heads.edges import edge_lift
from cdit.heads.head_types import HeadType, TypeThresholds, head_type
from cdit.heads.intervals import mean_estimates
from cdit.heads.measures import Layout
from cdit.heads.recording import LayerAttention
from cdit.heads.redundancy import head_distances
from cdit.heads.value_weighted import given_norms, value_weighted


@dataclass(frozen=True)
class HeadRow:
    """What was measured of one head at one diffusion time."""

    layer: int
    head: int
    time: float
    means: dict[str, Estimate]
    """By measure, the mean over samples, of means over goals and target patches. Those of what is moved (see
    `value_weighted`) begin with `moved`."""
    offset: tuple[int, int]
    """The preferred offset over the probe set, rows down and columns right, in patches."""
    offset_share: float
    """Its share of the mass on the past frames."""
    turning: Trend | None
    """Of where it looks in the newest frame, in columns, with dyaw, in patches per radian; see `directions`."""
    walking: Trend | None
    """Of the divergence of where it looks in the newest frame with dx, per metre."""
    type: HeadType

    @property
    def numbers(self) -> dict[str, float]:
        """All measures by name, without intervals."""
        return _numbers(self.means, self.offset, self.offset_share, self.turning, self.walking)


@dataclass
class _Sums:
    """Of one layer at one time."""

    values: dict[int, dict[str, Tensor]]
    """Per sample, (H,) by measure."""
    motions: dict[int, Tensor]
    """Per sample, (H, G, 2): the column translation and the divergence in the newest frame."""
    offsets: Tensor | float = 0.0
    distances: Tensor | float = 0.0


class HeadStatistics:
    """Gathers the measures of one kind of attention.

        statistics = HeadStatistics(layout, trajectories, edges, actions)
        for sample …, time …:
            with watch_attention(cdit, layers, kind, lambda layer: statistics.add(sample, time, layer)):
                cdit(…)  # of that sample alone

    Args:
        layout: of what is looked at: the past frames; for self-attention, one frame.
        trajectories: S names; intervals are bootstrapped over them.
        edges: (S, T, N) `edge_patches` of the past frames; for self-attention (S, G, 1, 1, N) of the targets. The lift
            is over their mean over the samples.
        actions: (S, G, 3) motion from the newest past frame to each target: dx, dy in metres, dyaw in radians. None
            for self-attention, in which nothing can move, and where motions are unknown.
        truth: (S, G, N, M) bool, `true_tokens`: which past tokens show what each target patch shows; None where that is
            not known.
        seed: of the resamples.
    """

    def __init__(
        self,
        layout: Layout,
        trajectories: Sequence[Hashable],
        edges: Tensor,
        actions: Tensor | None = None,
        truth: Tensor | None = None,
        seed: int = 0,
    ):
        self.layout, self.trajectories, self.seed = layout, list(trajectories), seed
        self._edges, self._chance = edges, edges.mean(0)
        self._actions, self._truth = actions, truth
        self._sums: dict[tuple[int, float], _Sums] = defaultdict(lambda: _Sums({}, {}))

    @torch.no_grad()
    def add(self, sample: int, time: float, attention: LayerAttention) -> None:
        """Measures one layer's attention of one sample.

        Args:
            sample: which, from 0.
            time: the diffusion time.
            attention: of that sample alone (B = 1).
        """
        sums = self._sums[attention.layer, time]
        weights = attention.weights()[0]  # (G, H, N, M[+1])
        scores = attention.scores()[0]
        found = {
            "score range": measures.score_range(scores),
            **self._measure(weights, sample),
        }
        found["effective share"] = found["effective tokens"] / scores.isfinite().sum(-1)
        del scores
        moved = value_weighted(weights, given_norms(attention.values()[0], attention.output_maps()))
        found |= {f"moved {name}": value for name, value in self._measure(moved, sample).items()}
        means = torch.stack([value.transpose(0, 1).flatten(1).nanmean(1) for value in found.values()]).cpu()
        sums.values[sample] = dict(zip(found, means, strict=True))
        if self._truth is not None:
            truth = self._truth[sample, :, None].to(weights.device)
            sums.values[sample] |= _correspondence(correspondence_score(weights, truth, self.layout))
        sums.offsets = sums.offsets + measures.offset_mass(weights, self.layout).mean(0).cpu()
        sums.distances = sums.distances + head_distances(weights).mean(0).cpu()
        if self._actions is not None:
            motion = fit_motion(offset_fields(weights, self.layout), self.layout)
            newest = torch.stack((motion.translation[..., -1, 1], motion.divergence[..., -1]), dim=-1)
            sums.motions[sample] = newest.transpose(0, 1).cpu()

    @property
    def measures(self) -> list[str]:
        """Names of what `values` gives."""
        sums = next(iter(self._sums.values()))
        return list(next(iter(sums.values.values())))

    def values(self, measure: str) -> tuple[np.ndarray, list[tuple[int, float, int]]]:
        """A measure of each sample and head, for `best_head`: (S, C), and layer, time and head of each column."""
        columns, labels = [], []
        for (layer, time), sums in sorted(self._sums.items()):
            found = torch.stack([sums.values[sample][measure] for sample in range(len(self.trajectories))])
            columns.append(found.double().numpy())
            labels += [(layer, time, head) for head in range(found.shape[1])]
        return np.concatenate(columns, axis=1), labels

    def distances(self) -> dict[tuple[int, float], Tensor]:
        """By layer and time, the mean `head_distances` over samples and goals, (H, H)."""
        return {key: sums.distances / len(sums.values) for key, sums in sorted(self._sums.items())}

    def rows(self, thresholds: TypeThresholds | None = None) -> list[HeadRow]:
        """One row for each layer, time and head, in this order.

        Args:
            thresholds: of the types.
        """
        return [row for key in sorted(self._sums) for row in self._rows(*key, thresholds)]

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
            "edge lift": edge_lift(weights, edges, self.layout, chance),
            **{f"mass frame {i + 1 - frames}": mass for i, mass in enumerate(masses)},
        }
        if weights.shape[-1] > frames * self.layout.patches:
            found["mass extra"] = measures.extra_share(weights, self.layout)
        return found

    def _rows(self, layer: int, time: float, thresholds: TypeThresholds | None) -> list[HeadRow]:
        sums = self._sums[layer, time]
        samples = sorted(sums.values)
        trajectories = [self.trajectories[sample] for sample in samples]
        names = list(sums.values[samples[0]])
        values = torch.stack([torch.stack([sums.values[sample][name] for name in names]) for sample in samples])
        heads = values.shape[-1]
        estimated = mean_estimates(values.flatten(1).double().numpy(), trajectories, self.seed)
        offset_maps = sums.offsets / len(samples)
        offsets = measures.largest_offset(offset_maps, self.layout).tolist()
        offset_shares = (offset_maps.amax((-2, -1)) / offset_maps.sum((-2, -1))).tolist()
        rows = []
        for head in range(heads):
            means = dict(zip(names, estimated[head::heads], strict=True))
            offset, offset_share = tuple(offsets[head]), offset_shares[head]
            turning, walking = self._trends(sums, head) if sums.motions else (None, None)
            kind = head_type(_numbers(means, offset, offset_share, turning, walking), thresholds)
            rows.append(HeadRow(layer, head, time, means, offset, offset_share, turning, walking, kind))
        return rows

    def _trends(self, sums: _Sums, head: int) -> tuple[Trend, Trend]:
        samples = sorted(sums.motions)
        goals = self._actions.shape[1]
        motion = torch.stack([sums.motions[sample][head] for sample in samples]).flatten(0, 1).double().numpy()
        factors = self._actions[samples].flatten(0, 1).double().cpu().numpy()
        names = [self.trajectories[sample] for sample in samples for _ in range(goals)]
        translation, divergence = (trends(motion[:, i], factors, names, self.seed) for i in range(2))
        return translation[2], divergence[0]


def type_counts(rows: Sequence[HeadRow]) -> dict[tuple[int, float], Counter[str]]:
    """By layer and time, how many heads are of each type."""
    counts: dict[tuple[int, float], Counter[str]] = defaultdict(Counter)
    for row in rows:
        counts[row.layer, row.time][row.type.name] += 1
    return dict(counts)


def _correspondence(score: CorrespondenceScore) -> dict[str, Tensor]:
    """From (G, H) to (H,) by measure: ratios of the sums over goals."""
    total = CorrespondenceScore(*(x.sum(0).cpu() for x in (score.mass, score.even, score.hits, score.patches)))
    return {
        "correspondence lift": total.lift,
        "correspondence share": total.share,
        "correspondence accuracy": total.accuracy,
    }


def _numbers(
    means: dict[str, Estimate],
    offset: tuple[int, int],
    offset_share: float,
    turning: Trend | None,
    walking: Trend | None,
) -> dict[str, float]:
    numbers = {name: estimate.mean for name, estimate in means.items()}
    numbers |= {"offset rows": offset[0], "offset columns": offset[1], "offset share": offset_share}
    for name, trend in (("turning", turning), ("walking", walking)):
        if trend is not None:
            numbers |= {f"{name} slope": trend.slope.mean, f"{name} correlation": trend.correlation}
    return numbers
