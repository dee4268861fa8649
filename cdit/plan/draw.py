"""Pictures of plans: paths from above, on a map if there is one, next to the frames."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from cdit.common.charts import font
from cdit.common.pictures import INK, PAPER, to_image
from cdit.data.action_space import ActionSpace
from cdit.doom.dataset import map_path
from cdit.doom.geometry import MapGeometry
from cdit.doom.maps import MAPS, file_name
from cdit.plan.free_space import walls

MARGIN = 1.0
"""Metres around the paths of a map."""
PLAN, TRUTH, OTHER = "#d1242f", "#1a7f37", "#0969da"


def map_of(data: str, trajectory: str) -> np.ndarray | None:
    """Walls (N, 4) x1, y1, x2, y2 in metres around a walk of a Doom dataset; None if there is no map."""
    name = next((name for name in MAPS if file_name(name) == trajectory.rpartition("_")[0]), None)
    path = None if name is None else map_path(Path(data), name)
    return walls(MapGeometry.load(path)) if path is not None and path.is_file() else None


def from_above(
    paths: Sequence[tuple[np.ndarray, str, float, str | None]],
    poses: Sequence[tuple[np.ndarray, str]],
    walls: np.ndarray | None = None,
    size: int = 320,
) -> Image.Image:
    """A square map with paths, x to the right and y up.

    Args:
        paths: (T, 2 or more) positions in metres, colour, width in points and a label for the legend.
        poses: (3,) x, y, yaw, and colour, drawn as arrows.
        walls: (N, 4).
        size: of the picture in pixels.
    """
    figure = Figure(figsize=(size / 100, size / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    points = np.concatenate([*(path[:, :2] for path, *_ in paths), *(pose[None, :2] for pose, _ in poses)])
    low, high = points.min(0) - MARGIN, points.max(0) + MARGIN
    middle, half = (low + high) / 2, (high - low).max() / 2
    axes.set_xlim(middle[0] - half, middle[0] + half)
    axes.set_ylim(middle[1] - half, middle[1] + half)
    axes.set_aspect("equal")
    axes.set_axis_off()
    if walls is not None:
        axes.plot(walls[:, [0, 2]].T, walls[:, [1, 3]].T, color=INK, linewidth=1.2)
    for path, colour, width, label in paths:
        axes.plot(path[:, 0], path[:, 1], color=colour, linewidth=width, label=label)
    for (x, y, yaw), colour in poses:
        reach = 0.08 * half
        axes.annotate(
            "", (x + 2 * reach * np.cos(yaw), y + 2 * reach * np.sin(yaw)), (x, y),
            arrowprops={"color": colour, "width": 2, "headwidth": 7, "headlength": 7},
        )  # fmt: skip
        axes.plot([x], [y], "o", color=colour, markersize=5)
    if any(label for *_, label in paths):
        axes.legend(loc="lower left", fontsize=7, framealpha=0.8)
    return _drawn(figure)


def numbers_over_time(tried: Tensor, costs: Tensor, truth: Tensor, plan: Tensor, space: ActionSpace) -> Image.Image:
    """A square picture with a chart for each number of an action, over the steps; at most six numbers.

    Args:
        tried: (S, H, K), candidates from the start to the end of each step.
        costs: (S,) of the candidates.
        truth: (H, K), recorded.
        plan: (H, K).
        space: names and units of the numbers.
    """
    shown = min(len(space.names), 6)
    figure = Figure(figsize=(3.2, 3.2), dpi=100, layout="constrained")
    steps = range(1, len(truth) + 1)
    colours = costs_as_colours(costs.numpy())
    for i, axes in enumerate(figure.subplots(shown, 1, sharex=True, squeeze=False)[:, 0]):
        for j in costs.argsort(descending=True).tolist():  # the lowest on top
            axes.plot(steps, tried[j, :, i], color=colours[j], linewidth=0.7)
        axes.plot(steps, truth[:, i], color=TRUTH, linewidth=2.2, label="true")
        axes.plot(steps, plan[:, i], color=PLAN, linewidth=2.2, label="plan")
        axes.set_title(f"{space.names[i]} {space.units[i]}".strip(), fontsize=7)
        axes.tick_params(labelsize=6)
    axes.legend(loc="lower left", fontsize=7, framealpha=0.8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _drawn(figure)


def _drawn(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def costs_as_colours(costs: np.ndarray) -> list[str]:
    """A colour for each cost by its rank, from blue for the lowest to a pale grey."""
    rank = costs.argsort().argsort() / max(1, len(costs) - 1)
    return [matplotlib.colors.to_hex(matplotlib.colormaps["Blues_r"](0.15 + 0.75 * r)) for r in rank]


def beside(images: Sequence[Image.Image], labels: Sequence[str], height: int = 320) -> Image.Image:
    """Images of one height next to each other, labels above."""
    scaled = [image.resize((round(image.width * height / image.height), height), 0) for image in images]
    gap, line = 8, 22
    whole = Image.new("RGB", (sum(image.width + gap for image in scaled) + gap, height + line + gap), PAPER)
    draw, x = ImageDraw.Draw(whole), gap
    for image, label in zip(scaled, labels, strict=True):
        whole.paste(image, (x, line))
        draw.text((x + image.width / 2, line / 2), label, INK, font(12), "mm")
        x += image.width + gap
    return whole


def frame(picture: Tensor, height: int = 320) -> Image.Image:
    """A frame (3, H, W), scaled to about that height."""
    return to_image(picture, max(1, round(height / picture.shape[-2])))
