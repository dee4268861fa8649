"""Pictures of heads: attention over frames, and heads × layers at a glance.

Every picture but the curve is a `sheet`, a table of small images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from cdit.common.charts import Line, colour_map, font, line_chart
from cdit.common.pictures import INK, PAPER, sheet
from cdit.heads.head_statistics import HeadRow
from cdit.heads.importance import PruningCurve
from cdit.heads.measures import Layout, extra_share, frame_maps

CELL = 160  # frames are magnified, by whole numbers, to about this many pixels
LARGEST = 256  # and shrunk to this many if they are larger
THUMBNAIL = 44  # height
NO_VALUE, BAR, EXTRA_BAR = (225, 225, 230), (203, 71, 71), (96, 108, 200)
PATCH, TRUE_PLACE = (64, 240, 255), (64, 255, 96)
TYPE_COLOURS = {
    "sink": (166, 118, 29), "same place": (27, 120, 183), "fixed offset": (117, 187, 232), "copy": (35, 139, 69),
    "turning": (217, 72, 1), "walking": (253, 174, 97), "edge": (136, 86, 167), "newest frame": (84, 39, 143),
    "oldest frame": (158, 154, 200), "one frame": (203, 201, 226), "broad": (150, 150, 150), "mixed": (224, 224, 228),
}  # fmt: skip

Colour = tuple[int, int, int]


@dataclass
class Scene:
    """The frames behind attention maps."""

    context: Tensor
    """(T, 3, H, W) uint8, the frames attended to, oldest first."""
    mask: Tensor
    """(T,) bool, True where the frame exists."""
    target: Tensor
    """(3, H, W) uint8."""
    patch: tuple[int, int]
    """Row and column of the target patch whose attention is shown."""
    itself: bool = False
    """Whether `context` is the target itself, as for self-attention."""

    @property
    def names(self) -> list[str]:
        """Names of the frames of `context`: their distance from the newest, …, −2, −1, 0."""
        frames = len(self.context)
        return ["itself"] if self.itself else [f"−{back}" if back else "0" for back in reversed(range(frames))]


# ---- attention over frames ----


def layer_figure(scene: Scene, weights: Tensor, layout: Layout, title: str) -> Image.Image:
    """One layer at one diffusion time: a row for each head, over the frames attended to.

    From left to right: the target with the chosen patch outlined; the attention of that patch on each frame (its own
    place outlined), and its mass per frame; the same for the mean over all target patches. One block is one patch.
    Colours of a row are scaled to its largest weight, separately for the patch and the mean.

    Args:
        weights: (H, N, M[+1]) of this target, on any device.
    """
    row, column = scene.patch
    groups = [group.float().cpu() for group in (weights[:, row * layout.columns + column], weights.mean(1))]
    size = cell_size(*scene.target.shape[-2:])
    target = frame_image(scene.target, size)
    outline(target, scene.patch, layout, thick=True)
    blank, frames = Image.new("RGB", (1, 1), PAPER), _frames(scene, size)
    cells, labels = [[target, *frames, blank, *frames, blank]], [("frames",)]
    for head in range(len(weights)):
        cells.append([target])
        for group in groups:
            maps = frame_maps(group[head], layout)
            masses = dict(zip(scene.names, maps.sum((-2, -1)).tolist(), strict=True))
            if group.shape[-1] > layout.frames * layout.patches:
                masses["extra"] = float(extra_share(group[head], layout))
            cells[-1] += [*_overlays(scene, maps, size, outlined=group is groups[0]), _bars(masses, size[1])]
        patch, mean = (float(frame_maps(group[head], layout).max()) for group in groups)
        labels.append((f"head {head}", f"patch max {patch:.2g}", f"mean max {mean:.2g}"))
    names = [name if scene.itself else f"frame {name}" for name in scene.names]
    headings = [f"attention of patch ({row}, {column})", f"mean over all {layout.patches} target patches"]
    columns = ["target", *(2 * [*names, "attention mass"])]
    spans = ["", *(heading for heading in headings for _ in range(len(frames) + 1))]
    scale = "Colours of a row run from 0 (dark) to its largest weight (pale yellow)."
    return sheet(title, scale, columns, labels, cells, spans)


def thumbnails(scene: Scene, weights: Tensor, layout: Layout) -> list[Image.Image]:
    """For each head, the attention of the chosen patch over the frames, side by side; see `layer_figure`."""
    size = (round(THUMBNAIL * scene.target.shape[-1] / scene.target.shape[-2]), THUMBNAIL)
    found = []
    for maps in frame_maps(weights[:, scene.patch[0] * layout.columns + scene.patch[1]].float().cpu(), layout):
        strip = Image.new("RGB", (len(maps) * (size[0] + 2) - 2, THUMBNAIL), PAPER)
        for i, cell in enumerate(_overlays(scene, maps, size)):
            strip.paste(cell, (i * (size[0] + 2), 0))
        found.append(strip)
    return found


def examples_figure(
    scene: Scene, predicted: Tensor, rows: Sequence[HeadRow], maps: Sequence[Tensor], places: Tensor | None
) -> Image.Image:
    """A row for each head: the predicted frame with the chosen patch, and the head's attention on each past frame.

    Args:
        predicted: (3, H, W) uint8.
        maps: of each head, (T, rows, columns) weights of the chosen patch on the past frames.
        places: (T, 2) row and column of the true place in patches; NaN if not visible, None if unknown.
    """
    layout = Layout(*maps[0].shape)
    size = cell_size(*predicted.shape[-2:])
    target = frame_image(predicted, size)
    outline(target, scene.patch, layout, thick=True)
    cells = [[target, *_overlays(scene, each, size)] for each in maps]
    for i in range(layout.frames if places is not None else 0):
        if scene.mask[i] and bool(places[i].isfinite().all()):
            for row_cells in cells:
                _ring(row_cells[1 + i], float(places[i, 1]) / layout.columns, float(places[i, 0]) / layout.rows)
    labels = [(row.type.name, f"layer {row.layer}, head {row.head}", row.type.reason) for row in rows]
    rings = "" if places is None else " Rings: the true place of what it shows."
    return sheet(
        "One head of each type: attention of one patch of a predicted frame",
        f"Squares: the patch and its own place.{rings}",
        ["predicted", *(f"frame {name}" for name in scene.names)],
        labels,
        cells,
        ["", *["past"] * layout.frames],
    )


def cell_size(height: int, width: int) -> tuple[int, int]:
    """(width, height) at which a frame is drawn."""
    longest = max(height, width)
    factor = max(1, round(CELL / longest)) if longest <= LARGEST else LARGEST / longest
    return max(1, round(width * factor)), max(1, round(height * factor))


def frame_image(frame: Tensor, size: tuple[int, int]) -> Image.Image:
    """A frame (3, H, W) uint8 at a size (width, height)."""
    image = Image.fromarray(frame.permute(1, 2, 0).cpu().numpy())
    return image.resize(size, Image.Resampling.NEAREST if size[0] >= image.width else Image.Resampling.BOX)


def heat_overlay(frame: Image.Image, heat: Tensor) -> Image.Image:
    """The frame in grey under a heat map (rows, columns) in [0, 1]; hotter places are more opaque."""
    heat_HW = np.asarray(Image.fromarray(heat.numpy().astype(np.float32)).resize(frame.size, Image.Resampling.NEAREST))
    colour = colour_map("inferno")(0.15 + 0.85 * heat_HW)[..., :3]
    grey = np.asarray(ImageOps.autocontrast(frame.convert("L")), dtype=np.float32)[..., None] / 255
    cover = (0.35 + 0.5 * np.sqrt(heat_HW))[..., None]
    return Image.fromarray(np.uint8(255 * ((1 - cover) * grey + cover * colour) + 0.5))


def missing_frame(size: tuple[int, int]) -> Image.Image:
    """A placeholder for a frame that does not exist."""
    return _text_cell("missing", NO_VALUE, *size)


def outline(image: Image.Image, patch: tuple[int, int], layout: Layout, thick: bool = False) -> None:
    """Outlines a patch of a frame, just outside it."""
    (row, column), (width, height) = patch, image.size
    left, right = (round(c * width / layout.columns) for c in (column, column + 1))
    top, bottom = (round(r * height / layout.rows) for r in (row, row + 1))
    draw = ImageDraw.Draw(image)
    if thick:
        draw.rectangle((left - 3, top - 3, right + 2, bottom + 2), outline=(0, 0, 0))
    far = 2 if thick else 1
    draw.rectangle((left - far, top - far, right + far - 1, bottom + far - 1), outline=PATCH, width=far)


def _frames(scene: Scene, size: tuple[int, int]) -> list[Image.Image]:
    pairs = zip(scene.context, scene.mask, strict=True)
    return [frame_image(frame, size) if exists else missing_frame(size) for frame, exists in pairs]


def _overlays(scene: Scene, maps: Tensor, size: tuple[int, int], outlined: bool = True) -> list[Image.Image]:
    """Maps (T, rows, columns) over the frames, scaled to their largest weight."""
    cells = _frames(scene, size)
    for i, heat in enumerate(maps / max(float(maps.max()), 1e-30)):
        if scene.mask[i]:
            cells[i] = heat_overlay(cells[i], heat)
            if outlined:
                outline(cells[i], scene.patch, Layout(*maps.shape))
    return cells


def _ring(image: Image.Image, across: float, down: float) -> None:
    """A ring around a place, in shares of the image's width and height."""
    x, y = across * image.width, down * image.height
    draw = ImageDraw.Draw(image)
    draw.ellipse((x - 8, y - 8, x + 8, y + 8), outline=(0, 0, 0), width=4)
    draw.ellipse((x - 7, y - 7, x + 7, y + 7), outline=TRUE_PLACE, width=2)


def _bars(masses: Mapping[str, float], height: int) -> Image.Image:
    """Horizontal bars from 0 to 1 with their values."""
    step = max(14, min(22, height // len(masses)))
    image = Image.new("RGB", (160, step * len(masses)), PAPER)
    draw = ImageDraw.Draw(image)
    for line, (name, mass) in enumerate(masses.items()):
        top, bottom, middle = line * step + 2, (line + 1) * step - 3, (line + 0.5) * step
        draw.text((34, middle), name, INK, font(11), anchor="rm")
        draw.rectangle((39, top, 125, bottom), (238, 238, 242))
        if mass:
            draw.rectangle((39, top, 39 + round(86 * mass), bottom), EXTRA_BAR if name == "extra" else BAR)
        draw.text((129, middle), f"{mass:.2f}", INK, font(11), anchor="lm")
    return image


# ---- heads × layers ----


def measure_heatmap(title: str, panels: Mapping[str, np.ndarray], layers: Sequence[int]) -> Image.Image:
    """Numbers as colours, all panels on one scale: yellow high, violet low, grey without a value.

    Args:
        panels: by title, such as one for each diffusion time: (layers, heads).
    """
    finite = np.concatenate([panel[np.isfinite(panel)] for panel in panels.values()] or [np.zeros(0)])
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)

    def cell(value: float) -> Image.Image:
        share = (value - low) / (high - low) if high > low else 0.5
        return _text_cell(f"{value:.3g}", _palette("viridis", share) if np.isfinite(value) else NO_VALUE)

    subtitle = f"colours from {low:.3g} (violet) to {high:.3g} (yellow)"
    return _panels(title, subtitle, {name: [[*map(cell, row)] for row in panel.tolist()] for name, panel in
                                     panels.items()}, [f"layer {layer}" for layer in layers])  # fmt: skip


def accuracy_chart(accuracy: Mapping[str, Mapping[int, Tensor]]) -> Image.Image:
    """Of each head, a map of the accuracy over the target's patches: (H, rows, columns) by title and layer."""

    def cell(values: np.ndarray) -> Image.Image:
        known = np.isfinite(values)[..., None]
        colours = np.where(known, colour_map("viridis")(np.nan_to_num(values), bytes=True)[..., :3], NO_VALUE)
        return Image.fromarray(np.uint8(colours)).resize(cell_size(*values.shape), Image.Resampling.NEAREST)

    cells = {name: [[*map(cell, maps.numpy())] for maps in by_layer.values()] for name, by_layer in accuracy.items()}
    layers = [f"layer {layer}" for layer in next(iter(accuracy.values()))]
    subtitle = "How often the largest weight is on a true place: 0 (violet) to 1 (yellow), grey if never visible"
    return _panels("accuracy by patch of the target", subtitle, cells, layers)


def type_chart(panels: Mapping[str, Sequence[Sequence[str]]], layers: Sequence[int]) -> Image.Image:
    """The type of each head of each layer, by title of the panel."""
    cells = {
        name: [[_text_cell(kind, TYPE_COLOURS[kind], 92) for kind in row] for row in panel]
        for name, panel in panels.items()
    }
    return _panels(
        "type of each head", "types are defined in summary.md", cells, [f"layer {layer}" for layer in layers]
    )


def distance_chart(distances: Mapping[str, Mapping[int, Tensor]]) -> Image.Image:
    """Jensen–Shannon distances between the heads of each layer, (H, H) by title and layer."""
    cells, labels = {}, []
    for name, by_layer in distances.items():
        rows = [row for matrix in by_layer.values() for row in matrix.tolist()]
        cells[name] = [[_text_cell(f"{value:.2f}", _palette("magma", 0.1 + 0.9 * value), 44, 20) for value in row]
                       for row in rows]  # fmt: skip
        labels = [f"layer {layer}, head {head}" for layer, matrix in by_layer.items() for head in range(len(matrix))]
    subtitle = "Jensen–Shannon distance between two heads' attention: 0 (dark) identical, 1 disjoint"
    return _panels("similarity of the heads of a layer", subtitle, cells, labels)


def pruning_picture(curve: PruningCurve) -> Image.Image:
    """The loss against the number of ablated heads, with bands of 95 % intervals."""
    lines = []
    for name, found, colour in (
        ("least needed first", curve.ordered, "#1b78b7"), ("in random order", curve.random, "#cb4747"),
    ):  # fmt: skip
        band = None if found[0].low is None else ([one.low for one in found], [one.high for one in found])
        lines.append(Line(name, curve.counts, [one.mean for one in found], colour, band=band))
    return line_chart({"Loss without heads": lines}, f"ablated heads, of {curve.counts[-1]}", "denoising loss")


def _palette(name: str, share: float) -> Colour:
    return tuple(int(c) for c in _colours(name)[round(255 * share)])


@cache
def _colours(name: str) -> np.ndarray:
    return colour_map(name)(np.arange(256), bytes=True)[:, :3]


def _text_cell(text: str, fill: Colour, width: int = 62, height: int = 30) -> Image.Image:
    image = Image.new("RGB", (width, height), fill)
    ink = INK if np.dot(fill, (0.299, 0.587, 0.114)) > 128 else PAPER
    ImageDraw.Draw(image).text((width / 2, height / 2), text, ink, font(11), anchor="mm")
    return image


def _panels(
    title: str, subtitle: str, panels: Mapping[str, list[list[Image.Image]]], rows: Sequence[str]
) -> Image.Image:
    """Tables of cells with the same rows, side by side; columns are heads."""
    cells = [[cell for part in line for cell in part] for line in zip(*panels.values(), strict=True)]
    heads = {name: range(len(panel[0])) for name, panel in panels.items()}
    columns = [f"head {head}" for numbers in heads.values() for head in numbers]
    spans = [name for name, numbers in heads.items() for _ in numbers]
    return sheet(title, subtitle, columns, [(row,) for row in rows], cells, spans, gap=1)
