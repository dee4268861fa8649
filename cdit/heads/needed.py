"""Which heads are needed: importance and pruning, as measures of the table, a section of the summary and a picture."""

from collections.abc import Mapping, Sequence
from io import BytesIO

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from cdit.common.statistics import Estimate
from cdit.heads.importance import Head, Importance
from cdit.heads.intervals import best_head, mean_estimates, reporting
from cdit.heads.pruning import PruningCurve
from cdit.heads.summary import markdown, shown


def importance_measures(
    measured: Importance, trajectories: Sequence[str], seed: int
) -> Mapping[Head, Mapping[str, Estimate]]:
    """`loss rise`, `contribution` and, where it was measured, `LPIPS rise` of each head."""
    values = {"loss rise": measured.loss_rise, "contribution": measured.contribution}
    if measured.distance_rise is not None:
        values["LPIPS rise"] = measured.distance_rise
    estimates = {name: mean_estimates(found, trajectories, seed) for name, found in values.items()}
    return {head: {name: found[i] for name, found in estimates.items()} for i, head in enumerate(measured.heads)}


def importance_section(
    measured: Importance, curve: PruningCurve, choosing: np.ndarray, trajectories: Sequence[str], seed: int
) -> str:
    """The most and the least needed head of each layer, and how the loss rises as more and more heads go."""
    sites = sorted({(head.kind, head.layer) for head in measured.heads})
    lines = []
    for kind, layer in sites:
        columns = measured.of(layer, kind)
        cells = [kind, str(layer)]
        for most in (True, False):
            best = best_head(measured.loss_rise[:, columns], choosing, trajectories, most, seed)
            number = measured.heads[columns[best.column]].number
            cells += [f"head {number}", shown(best.estimate, 2)]
        lines.append(cells)
    header = ["attention", "layer", "most needed", "loss rise", "least needed", "loss rise"]
    others = reporting(trajectories, choosing)
    (loss,) = mean_estimates(measured.loss[~choosing, None], others, seed)
    text = (
        "Each head by itself is taken out, its output replaced by zeros; the loss of the whole network is "
        f"{shown(loss)}. Heads are chosen on {int(choosing.sum())} samples, their loss rise is that on the "
        f"{len(others)} others; below zero, the network is better off without the head."
    )
    curve_lines = [
        [f"{count} of {curve.counts[-1]}", shown(ordered), shown(random)]
        for count, ordered, random in zip(curve.counts, curve.ordered, curve.random, strict=True)
    ]
    pruned = "Loss with more and more heads out, on samples that did not choose the order (importance_pruning.png):"
    return "\n".join([
        "## Which heads are needed?", "", text, "", markdown(header, lines), "", pruned, "",
        markdown(["heads out", "least needed first", "in random order"], curve_lines),
    ])  # fmt: skip


def pruning_picture(curve: PruningCurve) -> Image.Image:
    """The loss against the number of heads that are out, with bands of 95 % intervals."""
    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for name, found, colour in (
        ("least needed first", curve.ordered, "#1b78b7"), ("in random order", curve.random, "#cb4747"),
    ):  # fmt: skip
        axes.plot(curve.counts, [one.mean for one in found], "o-", color=colour, label=name, markersize=4)
        if found[0].low is not None:
            low, high = [one.low for one in found], [one.high for one in found]
            axes.fill_between(curve.counts, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel=f"heads taken out, of {curve.counts[-1]}", ylabel="denoising loss", title="How many heads can go?")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
