"""Line charts, and the font and colour maps of all pictures: what matplotlib, imported on first use, is needed for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageFont

if TYPE_CHECKING:
    from matplotlib.colors import Colormap


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf", f"DejaVuSans{'-Bold' * bold}.ttf"), size)


@cache
def colour_map(name: str) -> "Colormap":
    """Such as viridis."""
    import matplotlib

    return matplotlib.colormaps[name]


@dataclass(frozen=True)
class Line:
    """A line of a chart."""

    label: str
    """In the legend; left out if empty."""
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    style: str = "o-"
    """Markers and dashes, as in matplotlib."""
    marker_size: float = 4.0
    band: tuple[Sequence[float], Sequence[float]] | None = None
    """Lower and upper ends of an interval at each x, drawn as a band."""


def line_chart(
    panels: Mapping[str, Sequence[Line]], x_label: str, y_label: str = "", log: bool = False, from_zero: bool = False
) -> Image.Image:
    """Lines in panels side by side, by title; those of the first are in the legend.

    Args:
        log: whether x is on a logarithmic scale, of base 2.
        from_zero: whether y starts at 0.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 4.8 * len(panels), 4.3), dpi=110, layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, lines) in zip(row, panels.items(), strict=True):
        for line in lines:
            style = {"color": line.colour, "markersize": line.marker_size, "linewidth": 1.2}
            axes.plot(line.x, line.y, line.style, label=line.label or "_", **style)
            if line.band:
                axes.fill_between(line.x, *line.band, color=line.colour, alpha=0.15, linewidth=0)
        axes.set(xlabel=x_label, ylabel=y_label, title=title)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if log:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        if from_zero:
            axes.set_ylim(bottom=0)
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, handlelength=3.5)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
