"""Heads × layers at a glance: a heat map for each measure, the types, and how alike the heads of a layer are."""

import math
from collections.abc import Mapping, Sequence
from functools import cache

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from cdit.heads.figures import FAINT, INK, PAPER, font

CELL, LEFT, TOP, GAP = (62, 30), 86, 66, 34
TYPE_COLOURS = {
    "sink": (166, 118, 29), "same place": (27, 120, 183), "fixed offset": (117, 187, 232), "copy": (35, 139, 69),
    "turning": (217, 72, 1), "walking": (253, 174, 97), "edge": (136, 86, 167), "newest frame": (84, 39, 143),
    "oldest frame": (158, 154, 200), "one frame": (203, 201, 226), "broad": (150, 150, 150), "mixed": (224, 224, 228),
}  # fmt: skip

Panels = Mapping[str, np.ndarray]
"""By title, (layers, heads)."""


def measure_heatmap(title: str, panels: Panels, layers: Sequence[int]) -> Image.Image:
    """Numbers as colours, all panels on one scale: yellow high, violet low, grey where there is none.

    Args:
        title: name of the measure.
        panels: a number for each head, such as one panel for each diffusion time.
        layers: names of the rows.
    """
    finite = np.concatenate([panel[np.isfinite(panel)] for panel in panels.values()] or [np.zeros(0)])
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)

    def colour(value: float) -> tuple[int, int, int]:
        if not math.isfinite(value):
            return (225, 225, 230)
        share = (value - low) / (high - low) if high > low else 0.5
        return _palette("viridis")[round(255 * share)]

    cells = {
        name: [[(f"{value:.3g}", colour(value)) for value in map(float, row)] for row in panel]
        for name, panel in panels.items()
    }
    return _grid(title, f"colours from {low:.3g} (violet) to {high:.3g} (yellow)", cells, layers)


def type_chart(types: Mapping[str, Sequence[Sequence[str]]], layers: Sequence[int]) -> Image.Image:
    """Names as colours: for each panel, the type of each head of each layer."""
    cells = {
        name: [[(kind, TYPE_COLOURS[kind]) for kind in row] for row in panel] for name, panel in types.items()
    }  # fmt: skip
    return _grid("type of each head", "see summary.md for what the types mean", cells, layers, width=92)


def distance_chart(panels: Mapping[str, np.ndarray]) -> Image.Image:
    """Jensen–Shannon distances between the heads of a layer, (H, H) by title: dark is alike, 0 the same, 1 apart."""
    cells = {
        name: [
            [(f"{value:.2f}", _palette("magma")[round(255 * (0.1 + 0.9 * value))]) for value in row]
            for row in panel.tolist()
        ]
        for name, panel in panels.items()
    }
    heads = range(max(len(panel) for panel in panels.values()))
    subtitle = "Jensen–Shannon distance of what two heads look at: 0 (dark) the same, 1 nothing in common"
    return _grid("how alike the heads of a layer are", subtitle, cells, heads, width=44, label="head", per_line=4)


@cache
def _palette(name: str) -> list[tuple[int, int, int]]:
    """256 colours."""
    colours = matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3]
    return [tuple(map(int, colour)) for colour in colours]


def _grid(
    title: str,
    subtitle: str,
    panels: Mapping[str, Sequence[Sequence[tuple[str, tuple[int, int, int]]]]],
    rows: Sequence[int],
    width: int = CELL[0],
    label: str = "layer",
    per_line: int = 8,
) -> Image.Image:
    """Panels side by side of cells with a text on a colour; columns are heads."""
    panel_widths = [width * len(panel[0]) for panel in panels.values()]
    panel_width, per_line = max(panel_widths), min(per_line, len(panels))
    lines = -(-len(panels) // per_line)
    line_height = CELL[1] * len(rows) + 44 + GAP
    needed = max(font(17, True).getlength(title), font(12).getlength(subtitle)) + 24
    size = (max(round(needed), per_line * (panel_width + LEFT) + 12), TOP + lines * line_height - GAP + 12)
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((12, 8), title, INK, font(17, bold=True))
    draw.text((12, 34), subtitle, FAINT, font(12))
    for number, (name, panel) in enumerate(panels.items()):
        left = LEFT + number % per_line * (panel_width + LEFT)
        top = TOP + number // per_line * line_height
        draw.text((left, top - 2), name, INK, font(13, bold=True))
        top += 38
        for head in range(len(panel[0])):
            draw.text((left + (head + 0.5) * width, top - 10), f"head {head}" if width > 50 else str(head), FAINT,
                      font(11), anchor="mm")  # fmt: skip
        for line, (row, cells) in enumerate(zip(rows, panel, strict=True)):
            y = top + line * CELL[1]
            draw.text((left - 8, y + CELL[1] / 2), f"{label} {row}", INK, font(12), anchor="rm")
            for column, (text, fill) in enumerate(cells):
                x = left + column * width
                draw.rectangle((x, y, x + width - 2, y + CELL[1] - 2), fill)
                ink = INK if np.dot(fill, (0.299, 0.587, 0.114)) > 128 else PAPER
                draw.text((x + width / 2 - 1, y + CELL[1] / 2 - 1), text, ink, font(11), anchor="mm")
    return canvas
