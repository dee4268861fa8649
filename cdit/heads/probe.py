"""Attention of a world model on a probe batch: a page, figures, a table of heads, and scalars to follow."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cdit.common.pictures import to_float, to_uint8
from cdit.common.randomness import generator, seed_of
from cdit.common.statistics import Estimate
from cdit.heads.config import AttentionConfig, Kind
from cdit.heads.denoising import evaluating
from cdit.heads.drawings import Drawings
from cdit.heads.findings import best_heads, best_scores, halves, mean_scores
from cdit.heads.glossary import explain
from cdit.heads.heads import measure_heads
from cdit.heads.heatmaps import distance_chart, measure_heatmap, type_chart
from cdit.heads.importance import Head
from cdit.heads.intervals import reporting
from cdit.heads.measures import Layout
from cdit.heads.page import AttentionPage, HeadInfo
from cdit.heads.page.compression import affordable_top_k
from cdit.heads.recording import unwrap
from cdit.heads.report import AttentionReport
from cdit.heads.statistics import HeadStatistics
from cdit.heads.summary import about_samples, best_section, correspondence_section, types_section
from cdit.heads.table import HeadLine, by_layer, measure_names, series, table
from cdit.heads.truth import baseline_scores, tokens_at
from cdit.loading import spread
from cdit.world_model import WorldModel

NAMES = {"cross": "cross-attention", "self": "self-attention"}


@torch.no_grad()
def inspect_attention(
    world: WorldModel,
    batch: dict[str, Tensor],
    config: AttentionConfig,
    seed: int,
    trajectories: Sequence[str],
    places: Tensor | None = None,
    untrained: WorldModel | None = None,
    further: Mapping[Head, Mapping[str, Estimate]] | None = None,
    title: str = "Attention",
) -> AttentionReport:
    """Looks at attention while the true targets, noised to chosen diffusion times, are denoised.

    The batch is gone through one sample at a time, so that no more than one layer's weights of one sample are held.

    Args:
        world: the model; its `cdit` may be wrapped or compiled, what runs is the plain module in evaluation mode.
        batch: stacked items of a `WindowDataset`.
        config: what is looked at; of a larger batch, `samples` spread over it.
        seed: of the noise; one draw per sample, the same at all times.
        trajectories: the samples' own, over which intervals are bootstrapped.
        places: `true_places` of the batch, where they are known; its past frames are all there then.
        untrained: the same network with initial weights, a baseline of the correspondence score.
        further: other measures of heads, such as their importance.
        title: of page and summary.

    Raises:
        UserError: a layer or patch that the model does not have, or a value out of its range.
    """
    cdit = unwrap(world.cdit)
    layers, patch = config.resolve(cdit)
    rows = spread(list(range(len(batch["target"]))), config.samples)
    batch = {name: value[rows] for name, value in batch.items()}
    longest = cdit.config.max_context
    batch |= {name: batch[name][:, -longest:] for name in ("context", "context_mask")}
    if not world.description.has_actions:
        batch["action_mask"] = torch.zeros_like(batch["action_mask"])
    trajectories = [trajectories[row] for row in rows]
    places = None if places is None else places[rows]
    choosing = halves(trajectories, seed)
    drawn = min(config.drawn, len(rows))
    frames = batch["context"].shape[1]

    goals = batch["target"].shape[1]
    summary = [f"# {title}", about_samples(trajectories, goals, config.times)]
    page, lines = None, []
    images: dict[str, tuple[Image.Image, str]] = {}
    thumbnails: dict[str, Image.Image] = {}
    for kind in config.kinds:
        layout = Layout(frames if kind == "cross" else 1, *cdit.grid)
        truth = None if places is None or kind == "self" else tokens_at(places, layout)
        shown = {layers[0], layers[len(layers) // 2], layers[-1]}
        drawings = Drawings(batch, layout, kind, patch, drawn, shown)
        if kind == "cross" and drawn:
            maps = drawn * len(drawings.goals) * len(config.times) * len(layers) * cdit.config.num_heads
            kept = affordable_top_k(layout, maps)
            page = drawings.page = AttentionPage(title, layout, world.description.fps, cdit.config.extra_kv, kept)
            predictions = _predictions(world, batch, drawn, seed)
            drawings.add_samples(predictions, places)

        statistics = measure_heads(
            world, batch, trajectories, config.times, seed, kind, layers, truth, watch=drawings.watch
        )
        found = [
            HeadLine(kind, row, (further or {}).get(Head(row.layer, kind, row.head), {})) for row in statistics.rows()
        ]
        lines += found
        images |= drawings.images | _charts(kind, found, statistics)
        if kind == "cross" and drawn:
            caption = "one head of each type, from one patch of the first sample; rings are where it truly was"
            images["attention/examples"] = drawings.examples(found, predictions, places), caption
        if drawn:
            thumbnails |= {
                line.thumbnail: drawings.small[line.row.layer, line.row.time, line.row.head] for line in found
            }
        summary.append(types_section(NAMES[kind], [line.row for line in found]))
        if choosing is not None:
            summary.append(best_section(NAMES[kind], best_heads(statistics, choosing), choosing))
        if truth is not None and choosing is not None:
            compared = None
            if untrained is not None:
                compared = measure_heads(untrained, batch, trajectories, config.times, seed, kind, layers, truth)
            summary.append(_correspondence(statistics, compared, truth, layout, choosing))

    if page is not None:
        cross = [line for line in lines if line.kind == "cross"]
        measures = measure_names(cross)
        heads = []
        for line in cross:
            row, numbers = line.row, {name: line.numbers[name] for name in measures}
            heads.append(HeadInfo(row.layer, row.head, row.type.name, numbers, row.time, row.type.reason))
        page.set_heads(heads, explain(measures, {line.row.type.name for line in cross}))
    columns, cells = table(lines)
    text = "\n\n".join(summary) + "\n"
    return AttentionReport(text, images, thumbnails, columns, cells, series(lines), page)


def _predictions(world: WorldModel, batch: dict[str, Tensor], drawn: int, seed: int) -> Tensor:
    """What the model, as it samples, makes of the drawn samples' goals: (drawn, G, 3, H, W) uint8 on the CPU."""
    plain = WorldModel(unwrap(world.cdit), world.codec, world.description)
    device = next(plain.parameters()).device
    items = {name: value[:drawn].to(device) for name, value in batch.items()}
    with evaluating(plain):
        predictions = plain.predict(
            to_float(items["context"]),
            items["action"],
            items["time_shift"],
            context_mask=items["context_mask"],
            action_mask=items["action_mask"],
            spacing=items["spacing"],
            generator=generator(seed_of(seed, 1)),
        )
    return to_uint8(predictions).cpu()


def _charts(kind: Kind, lines: Sequence[HeadLine], statistics: HeadStatistics) -> dict[str, tuple[Image.Image, str]]:
    """Heads × layers: a heat map for each measure, one of the types, one of the distances between heads."""
    prefix = f"attention/{'' if kind == 'cross' else 'self/'}"
    times, layers = (sorted({getattr(line.row, name) for line in lines}) for name in ("time", "layer"))
    explained = explain(measure_names(lines), [])
    images = {}
    for name in measure_names(lines):
        if not name.startswith("moved "):
            panels = {f"t = {time:g}": by_layer(lines, kind, time, name) for time in times}
            chart = measure_heatmap(f"{name}, {NAMES[kind]}", panels, layers)
            images[f"{prefix}measures/{name}"] = chart, explained[name]
    types = {
        f"t = {time:g}": [
            [line.row.type.name for line in lines if (line.row.layer, line.row.time) == (layer, time)]
            for layer in layers
        ]
        for time in times
    }
    counted = "; ".join(sorted({f"{line.row.type.name}: {line.row.type.reason}" for line in lines})[:3])
    images[f"{prefix}types"] = type_chart(types, layers), f"by thresholds on measures, such as {counted}"
    distances = {f"layer {layer}, t = {time:g}": found.numpy() for (layer, time), found in
                 statistics.distances().items()}  # fmt: skip
    caption = "Jensen–Shannon distance between what the heads of a layer look at, mean over samples and patches"
    images[f"{prefix}head_distances"] = distance_chart(distances), caption
    return images


def _correspondence(
    statistics: HeadStatistics,
    untrained: HeadStatistics | None,
    truth: Tensor,
    layout: Layout,
    choosing: np.ndarray,
) -> str:
    others = reporting(statistics.trajectories, choosing)
    scores = {}
    for name, found in {"best head": statistics, "untrained, best head": untrained}.items():
        best = None if found is None else best_scores(found, choosing)
        if best is not None:
            scores[f"{name} ({best[0]})"] = best[1]
    scores["mean of all heads"] = mean_scores(statistics, choosing)
    if untrained is not None:
        scores["untrained, mean of all heads"] = mean_scores(untrained, choosing)
    scores |= baseline_scores(truth[torch.from_numpy(~choosing)], layout, others, statistics.seed)
    return correspondence_section(scores, len(others))
