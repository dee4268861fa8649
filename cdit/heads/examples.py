"""One head of each type, side by side: where the same patch of a predicted frame looks in the past."""

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw
from torch import Tensor

from cdit.heads.figures import (
    FAINT,
    GAP,
    INK,
    OUTLINE,
    PAPER,
    Scene,
    cell_size,
    font,
    frame_image,
    heat_overlay,
    missing_frame,
    outline,
    patch_box,
)
from cdit.heads.table import HeadLine

LABEL_WIDTH, TOP, FOOT = 190, 58, 34
TRUE_PLACE = (64, 255, 96)
COUNT = 4


class Example(NamedTuple):
    """A row of the figure."""

    line: HeadLine
    maps: Tensor
    """(T, rows, columns) weights of the chosen patch on the past frames, oldest first."""


def one_of_each_type(lines: Sequence[HeadLine]) -> list[HeadLine]:
    """Of the first diffusion time, the first head of each type; at most `COUNT`, those without a type last."""
    first: dict[str, HeadLine] = {}
    for line in lines:
        if line.row.time == lines[0].row.time:
            first.setdefault(line.row.type.name, line)
    return sorted(first.values(), key=lambda line: line.row.type.name == "mixed")[:COUNT]


def examples_figure(scene: Scene, predicted: Tensor, examples: Sequence[Example], places: Tensor | None) -> Image.Image:
    """A row for each head: the predicted frame with the chosen patch, then each past frame under the head's weights.

    Each row's colours run from 0 to its largest weight; thin squares are the patch's own place, rings the true place
    of what it shows.

    Args:
        scene: past frames and the chosen patch.
        predicted: (3, H, W) uint8.
        examples: the rows.
        places: (T, 2) row and column of the true place in patches; NaN where it is not in sight, None where not known.
    """
    frames, *grid = examples[0].maps.shape
    width, height = size = cell_size(*predicted.shape[-2:])
    left = [LABEL_WIDTH, *(LABEL_WIDTH + width + 4 * GAP + i * (width + GAP) for i in range(frames))]
    canvas = Image.new("RGB", (left[-1] + width + 2 * GAP, TOP + len(examples) * (height + GAP) + FOOT), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text(
        (2 * GAP, 10), "One head of each type, looking from one patch of a predicted frame", INK, font(15, bold=True)
    )
    for x, name in zip(left, ["predicted", *(f"frame {name}" for name in scene.names)], strict=True):
        draw.text((x, TOP - 20), name, INK, font(13))
    box = patch_box(scene.patch, tuple(grid), size)
    for number, (line, maps) in enumerate(examples):
        y = TOP + number * (height + GAP)
        row = line.row
        draw.text((2 * GAP, y + height // 2 - 28), row.type.name, INK, font(15, bold=True))
        draw.text((2 * GAP, y + height // 2 - 6), f"layer {row.layer}, head {row.head}", INK, font(13))
        draw.text((2 * GAP, y + height // 2 + 12), row.type.reason, FAINT, font(11))
        target = frame_image(predicted, size)
        outline(ImageDraw.Draw(target), box)
        canvas.paste(target, (left[0], y))
        for i in range(frames):
            cell = missing_frame(size)
            if scene.context_mask[i]:
                cell = heat_overlay(frame_image(scene.context[i], size), maps[i] / max(float(maps.max()), 1e-30))
                pen = ImageDraw.Draw(cell)
                outline(pen, box, thin=True)
                if places is not None and bool(places[i].isfinite().all()):
                    _ring(pen, float(places[i, 1]) / grid[1] * width, float(places[i, 0]) / grid[0] * height)
            canvas.paste(cell, (left[1 + i], y))
    foot = canvas.height - FOOT + 8
    draw.rectangle((LABEL_WIDTH, foot + 2, LABEL_WIDTH + 12, foot + 14), outline=OUTLINE, width=2)
    draw.text((LABEL_WIDTH + 20, foot), "the patch, and its own place", FAINT, font(12))
    if places is not None:
        _ring(draw, LABEL_WIDTH + 228, foot + 8)
        draw.text((LABEL_WIDTH + 242, foot), "where what it shows truly was", FAINT, font(12))
    return canvas


def _ring(draw: ImageDraw.ImageDraw, x: float, y: float) -> None:
    draw.ellipse((x - 8, y - 8, x + 8, y + 8), outline=(0, 0, 0), width=4)
    draw.ellipse((x - 7, y - 7, x + 7, y + 7), outline=TRUE_PLACE, width=2)
