"""A report on the attention of a world model: record, measure, choose honestly, draw, report."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cdit.batch import Batch
from cdit.common.errors import UserError
from cdit.common.frames import to_float, to_uint8
from cdit.common.randomness import generator, seed_of
from cdit.common.statistics import Estimate
from cdit.evaluate.metrics import load_metrics
from cdit.heads import draw
from cdit.heads.choose import (
    accuracy_by_row,
    best_heads,
    best_scores,
    mean_estimates,
    mean_scores,
    reporting,
    split_halves,
)
from cdit.heads.config import AttentionConfig, HeadsConfig, ImportanceConfig, Kind
from cdit.heads.correspondence import SCORES, baselines, correspondence_score, true_tokens
from cdit.heads.glossary import MIXED, explain_measures, explain_types
from cdit.heads.head_statistics import HeadRow, HeadStatistics, measure_heads
from cdit.heads.importance import Ablation, Head, importance, pruning_curve
from cdit.heads.measures import Layout, frame_maps
from cdit.heads.page import AttentionPage, affordable_top_k
from cdit.heads.record import LayerAttention, evaluating
from cdit.heads.report import (
    NAMES,
    AttentionReport,
    best_section,
    correspondence_section,
    importance_section,
    measure_names,
    prefix,
    samples_section,
    types_section,
)
from cdit.heads.sources import Source
from cdit.loading import spread
from cdit.model import CDiT
from cdit.world_model import WorldModel

EXAMPLES = 4
"""Most heads in the figure of one head of each type."""


@torch.no_grad()
def inspect_attention(
    world: WorldModel,
    batch: Batch,
    config: AttentionConfig,
    seed: int,
    trajectories: Sequence[str],
    places: Tensor | None = None,
    untrained: WorldModel | None = None,
    further: Mapping[Head, Mapping[str, Estimate]] | None = None,
    title: str = "Attention",
    progress: bool = False,
) -> AttentionReport:
    """Inspects attention while the true targets, noised to chosen diffusion times, are denoised.

    The batch is processed one sample at a time, so that at most one layer's weights of one sample are held.

    Args:
        world: the model; its bare network runs in evaluation mode.
        batch: windows of frames, with time shifts.
        config: what is inspected; of a larger batch, `samples` spread evenly over it.
        seed: of the noise; one draw per sample, the same at all times.
        trajectories: of the samples; intervals are bootstrapped over them.
        places: `true_places` of the batch, if known; then no past frame may be missing.
        untrained: the same network with initial weights, a baseline of the correspondence score.
        further: other measures of heads, such as their importance.

    Raises:
        UserError: a layer or patch that the model does not have, or a value out of range.
    """
    cdit = world.cdit
    layers, patch = config.resolve(cdit)
    rows, longest = spread(list(range(len(batch))), config.samples), cdit.config.max_context
    batch = batch[rows]
    batch = replace(batch, context=batch.context[:, -longest:], mask=batch.mask[:, -longest:])
    trajectories = [trajectories[row] for row in rows]
    places = None if places is None else places[rows]
    choosing = split_halves(trajectories, seed)
    drawn = min(config.drawn, len(rows))
    predictions = _predictions(world, batch, drawn, seed) if drawn and "cross" in config.kinds else None

    report = AttentionReport("", {}, [], [], None)
    summary = [f"# {title}", samples_section(trajectories, batch.target.shape[1], config.times)]
    for kind in config.kinds:
        layout = Layout(batch.context.shape[1] if kind == "cross" else 1, *cdit.grid)
        truth = None if places is None or kind == "self" else true_tokens(places, layout)
        album = _Album(batch.to("cpu"), layout, kind, patch, drawn, {layers[0], layers[len(layers) // 2], layers[-1]})
        if kind == "cross" and drawn:
            maps = drawn * len(album.goals) * len(config.times) * len(layers) * cdit.config.num_heads
            kept = affordable_top_k(layout, maps)
            album.page = AttentionPage(title, layout, world.description.fps, cdit.config.extra_kv, kept)
            album.add_samples(predictions, places)

        options = (batch, trajectories, config.times, seed, kind, layers, truth)
        statistics = measure_heads(world, *options, album.watch, progress)
        found = statistics.rows()
        for row in found:
            row.measures |= (further or {}).get(Head(row.layer, kind, row.head), {})

        summary.append(types_section(found))
        if choosing is not None:
            summary.append(best_section(kind, best_heads(statistics, choosing), choosing))
            if truth is not None:
                compared = None
                if untrained is not None:
                    compared = measure_heads(untrained, *options, progress=progress)
                summary.append(_correspondence(statistics, compared, truth, choosing))

        report.rows += found
        report.images |= album.images | _charts(found, statistics)
        report.thumbnails += [album.small[row.layer, row.time][row.head] for row in found if drawn]
        if album.page is not None:
            caption = "one head of each type, from one patch of the first sample; rings: where its content truly was"
            report.images["attention/examples"] = album.examples(found, predictions, places), caption
            types, measures = {row.type.name for row in found}, measure_names(found)
            album.page.set_heads(found, measures, explain_types(types) | explain_measures(measures))
            report.page = album.page
    report.summary = "\n\n".join(summary) + "\n"
    return report


def inspect_source(world: WorldModel, source: Source, config: HeadsConfig) -> AttentionReport:
    """The report of `python -m cdit.heads`: attention and, if configured, the importance of heads."""
    trajectories, seed = source.trajectories, config.seed
    measured = further = None
    if config.importance != "no":
        how = ImportanceConfig(config.layers, config.kinds, config.ablation, config.times)
        ablation = Ablation(world, source.batch, how, seed, progress=True)
        lpips = None
        if config.importance == "lpips":
            if not world.codec.has_decoder:
                raise UserError("importance is lpips, but the codec has no decoder: expected loss")
            lpips = load_metrics(world.device, tuple(world.description.image_size), ("lpips",)).get("lpips")
        measured = importance(ablation, lpips)
        further = measured.measures(trajectories, seed)
    untrained = initial(world, seed) if config.untrained and source.places is not None else None
    title = f"Attention of {config.checkpoint} on {config.data or config.frames}"
    report = inspect_attention(
        world, source.batch, config, seed, trajectories, source.places, untrained, further, title, progress=True
    )
    if source.places is None:
        report.summary += f"\nTrue places are unknown: {source.unknown}.\n"
    choosing = split_halves(trajectories, seed)
    if measured is not None and choosing is not None:
        curve = pruning_curve(ablation, measured, choosing, trajectories)
        section = importance_section(measured, curve, choosing, trajectories, seed, config.ablation)
        report.summary += f"\n{section}\n"
        caption = "loss as more and more heads are ablated, on samples that did not choose their order"
        report.images["attention/importance/pruning"] = draw.pruning_picture(curve), caption
    return report


def initial(world: WorldModel, seed: int) -> WorldModel:
    """The same network with initial weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        cdit = CDiT.from_config(world.cdit.config)
    return WorldModel(cdit.to(world.device).eval(), world.codec, replace(world.description)).eval()


def _predictions(world: WorldModel, batch: Batch, drawn: int, seed: int) -> Tensor:
    """The frames that the model samples for the drawn samples' goals: (drawn, G, 3, H, W) uint8 on the CPU."""
    items = batch[:drawn].to(world.device)
    with evaluating(world):
        predictions = world.predict(
            to_float(items.context), items.condition, items.mask, generator=generator(seed_of(seed, 1))
        )
    return to_uint8(predictions).cpu()


@dataclass
class _Album:
    """Draws the first samples as their attention is recorded; no weights are kept."""

    batch: Batch
    layout: Layout
    kind: Kind
    patch: tuple[int, int]
    drawn: int
    figure_layers: Collection[int]
    """Layers with figures; the page has all."""
    page: AttentionPage | None = None
    images: dict[str, tuple[Image.Image, str]] = field(default_factory=dict)
    small: dict[tuple[int, float], list[Image.Image]] = field(default_factory=dict)
    """By layer and time, a thumbnail of each head, of the first sample and goal."""
    maps: dict[tuple[int, float], Tensor] = field(default_factory=dict)
    """By layer and time, (H, T, rows, columns): attention of the chosen patch of the first sample and goal."""

    @property
    def goals(self) -> list[int]:
        """The goals on the page: the first and the last."""
        return sorted({0, self.batch.target.shape[1] - 1})

    def add_samples(self, predictions: Tensor, places: Tensor | None) -> None:
        for sample in range(self.drawn):
            for goal in self.goals:
                self.page.add_sample(
                    self._where(sample, goal),
                    self.batch.context[sample],
                    self.batch.mask[sample],
                    self.batch.target[sample, goal],
                    predictions[sample, goal],
                    None if places is None else places[sample, goal],
                )

    def watch(self, sample: int, time: float, attention: LayerAttention) -> None:
        if sample >= self.drawn:
            return
        weights, layer = attention.weights()[0], attention.layer
        if self.page is not None:
            for number, goal in enumerate(self.goals):
                self.page.add_weights(sample * len(self.goals) + number, layer, time, weights[goal])
        scene, weights = self._scene(sample), weights[0]
        if sample == 0:
            chosen = weights[:, self.patch[0] * self.layout.columns + self.patch[1]]
            self.maps[layer, time] = frame_maps(chosen, self.layout).float().cpu()
            self.small[layer, time] = draw.thumbnails(scene, weights, self.layout)
        if layer in self.figure_layers:
            title = f"Layer {layer} · {NAMES[self.kind]} · diffusion time {time:g} · {self._where(sample, 0)}"
            caption = (
                f"{title}. Left: target, patch {self.patch} outlined; attention of this patch; mean over all "
                f"{self.layout.patches} patches. Rows: heads 0 to {len(weights) - 1}. Columns: "
                f"{'past frames, oldest first' if self.kind == 'cross' else 'the target itself'}. Bars: attention mass."
            )
            name = f"{prefix(self.kind)}layer{layer:02d}/t{time:g}/sample{sample}"
            self.images[name] = draw.layer_figure(scene, weights, self.layout, title), caption

    def examples(self, rows: Sequence[HeadRow], predictions: Tensor, places: Tensor | None) -> Image.Image:
        """The first head of each type at the first diffusion time, `mixed` last."""
        first: dict[str, HeadRow] = {}
        for row in rows:
            if row.time == rows[0].time:
                first.setdefault(row.type.name, row)
        chosen = sorted(first.values(), key=lambda row: row.type.name == MIXED)[:EXAMPLES]
        maps = [self.maps[row.layer, row.time][row.head] for row in chosen]
        patch = self.patch[0] * self.layout.columns + self.patch[1]
        place = None if places is None else places[0, 0, patch]
        return draw.examples_figure(self._scene(0), predictions[0, 0], chosen, maps, place)

    def _where(self, sample: int, goal: int) -> str:
        return f"sample {sample}, goal {float(self.batch.condition.time_shift[sample, goal]):+.2g} s"

    def _scene(self, sample: int) -> draw.Scene:
        target = self.batch.target[sample, 0]
        if self.kind == "self":
            return draw.Scene(target[None], torch.ones(1, dtype=torch.bool), target, self.patch, itself=True)
        return draw.Scene(self.batch.context[sample], self.batch.mask[sample], target, self.patch)


def _charts(rows: Sequence[HeadRow], statistics: HeadStatistics) -> dict[str, tuple[Image.Image, str]]:
    """Heads × layers: a heat map for each measure, the types, and the distances between heads."""
    start, name_of_kind = prefix(statistics.kind), NAMES[statistics.kind]
    times, layers = (sorted({getattr(row, name) for row in rows}) for name in ("time", "layer"))
    panels = {
        f"t = {time:g}": [[row for row in rows if (row.layer, row.time) == (layer, time)] for layer in layers]
        for time in times
    }
    images = {}
    for measure in measure_names(rows):
        if not measure.startswith("moved "):
            values = {
                title: np.array([[row.measures[measure].mean for row in line] for line in panel])
                for title, panel in panels.items()
            }
            chart = draw.measure_heatmap(f"{measure}, {name_of_kind}", values, layers)
            images[f"{start}measures/{measure}"] = chart, explain_measures([measure])[measure]
    types = {title: [[row.type.name for row in line] for line in panel] for title, panel in panels.items()}
    reasons = "; ".join(sorted({f"{row.type.name}: {row.type.reason}" for row in rows})[:3])
    if SCORES[-1] in statistics.measures:
        hits, visible = statistics.hits(range(len(statistics.trajectories)))
        maps = (hits / visible).unflatten(0, (len(layers), len(times), -1))
        accuracy = {f"t = {time:g}": dict(zip(layers, maps[:, i], strict=True)) for i, time in enumerate(times)}
        caption = "correspondence accuracy of each head by patch of the target"
        images[f"{start}accuracy_by_patch"] = draw.accuracy_chart(accuracy), caption
    images[f"{start}types"] = draw.type_chart(types, layers), f"types by thresholds on measures, such as {reasons}"
    found = statistics.distances()
    distances = {f"t = {time:g}": {layer: found[layer, time] for layer in layers} for time in times}
    caption = "Jensen–Shannon distance between the attention of the heads of a layer, mean over samples and patches"
    images[f"{start}head_distances"] = draw.distance_chart(distances), caption
    return images


def _correspondence(
    statistics: HeadStatistics, untrained: HeadStatistics | None, truth: Tensor, choosing: np.ndarray
) -> str:
    others = reporting(statistics.trajectories, choosing)
    scores, by_row = {}, []
    for name, found in {"best head": statistics, "untrained, best head": untrained}.items():
        best = None if found is None else best_scores(found, choosing)
        if best is not None:
            scores[f"{name} ({best.head})"] = best.scores
        if best is not None and found is statistics:
            by_row = accuracy_by_row(statistics, choosing, best.column)
    scores["mean of all heads"] = mean_scores(statistics, choosing)
    if untrained is not None:
        scores["untrained, mean of all heads"] = mean_scores(untrained, choosing)
    for name, weights in baselines(statistics.layout).items():
        score = correspondence_score(weights, truth[torch.from_numpy(~choosing)], statistics.layout).sum(1)
        values = torch.stack(list(score.ratios().values()), dim=1).double().numpy()
        scores[name] = mean_estimates(values, others, statistics.seed)
    return correspondence_section(scores, by_row, len(others))
