"""Drawing true correspondences: the same surface points, numbered, in a target frame and in past frames."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from cdit.doom.correspondence import Correspondence, Sight
from cdit.doom.raycast import Surface
from cdit.heads.figures import font, frame_name

CELL, GAP, HEADING, RADIUS = 384, 16, 40, 11
INK, PAPER, FAINT, CROSS = (24, 24, 28), (255, 255, 255), (120, 120, 128), (230, 30, 40)


def correspondence_figure(
    target: Tensor,
    past: Tensor,
    correspondence: Correspondence,
    grid: tuple[int, int],
    names: Sequence[str] | None = None,
    points: int = 25,
) -> Image.Image:
    """The target with numbered points at patch centres, and each past frame with the same numbers where they truly are.

    Points that are hidden there are crossed out; those outside of a frame, or behind its camera, are listed below it. A
    grey dot in the target is a patch of which nothing is known: sky, doors, what is behind gratings.

    Args:
        target: (3, H, W) uint8.
        past: (T, 3, H, W) uint8.
        correspondence: of this target with these frames: places of shape (N, T, 2).
        grid: rows and columns of patches.
        names: of the past frames; by default how far each is from the newest, the last.
        points: how many patches are drawn, about; they are spread evenly.
    """
    rows, columns = grid
    every = max(1, round((rows * columns / points) ** 0.5))
    chosen = [r * columns + c for r in range(every // 2, rows, every) for c in range(every // 2, columns, every)]
    height = round(CELL * target.shape[-2] / target.shape[-1])
    canvas = Image.new("RGB", (GAP + (len(past) + 1) * (CELL + GAP), HEADING + height + 56), PAPER)
    draw = ImageDraw.Draw(canvas)
    corners = [(GAP + column * (CELL + GAP), HEADING) for column in range(len(past) + 1)]
    names = names or [f"frame {frame_name(i, len(past))}" for i in range(len(past))]
    for frame, corner, name in zip([target, *past], corners, ["target", *names], strict=True):
        picture = Image.fromarray(frame.permute(1, 2, 0).cpu().numpy())
        canvas.paste(picture.resize((CELL, height), Image.Resampling.BICUBIC), corner)
        draw.text((corner[0], 12), name, INK, font(17))

    def put(corner: tuple[float, float], place: np.ndarray) -> tuple[float, float]:
        return corner[0] + place[1] / columns * CELL, corner[1] + place[0] / rows * height

    def write(corner: tuple[float, float], *lines: str) -> None:
        for i, line in enumerate(lines):
            draw.text((corner[0], HEADING + height + 8 + 22 * i), line, FAINT, font(14))

    known = (correspondence.sight != Sight.UNKNOWN).any(-1)
    for number, patch in enumerate(chosen):
        x, y = put(corners[0], np.array(divmod(patch, columns)) + 0.5)
        if known[patch]:
            _point(draw, x, y, number)
        else:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), FAINT)
    kinds = [
        f"{(correspondence.surface[known] == kind).sum()} {kind.name.lower()}"
        for kind in (Surface.WALL, Surface.FLOOR, Surface.CEILING)
    ]
    write(corners[0], f"patches: {', '.join(kinds)}, {(~known).sum()} unknown")

    for frame, corner in enumerate(corners[1:]):
        sight, place = correspondence.sight[:, frame], correspondence.place[:, frame]
        for number, patch in enumerate(chosen):
            if sight[patch] in (Sight.VISIBLE, Sight.HIDDEN):
                _point(draw, *put(corner, place[patch]), number, crossed=sight[patch] == Sight.HIDDEN)
        outside = [str(number) for number, patch in enumerate(chosen) if sight[patch] == Sight.OUTSIDE]
        shares = [f"{(sight == kind).mean():.0%} {kind.name.lower()}" for kind in (Sight.VISIBLE, Sight.HIDDEN)]
        write(corner, ", ".join(shares), f"outside: {' '.join(outside) or 'none'}")
    return canvas


def _point(draw: ImageDraw.ImageDraw, x: float, y: float, number: int, crossed: bool = False) -> None:
    hue = number * 0.382 % 1  # neighbouring numbers have hues far apart
    colour = tuple(round(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.55, 1))
    if crossed:
        reach = RADIUS + 4
        draw.line((x - reach, y - reach, x + reach, y + reach), CROSS, 4)
        draw.line((x - reach, y + reach, x + reach, y - reach), CROSS, 4)
    draw.ellipse(
        (x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS), colour, CROSS if crossed else INK, 2 if crossed else 1
    )
    draw.text((x, y), str(number), INK, font(13), anchor="mm")
