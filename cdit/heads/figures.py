"""Drawing attention maps over frames: one row a head, one column a past frame."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

CELL = 160  # frames are magnified, by whole numbers, to about this many pixels
LARGEST = 256  # and shrunk to this many where they are larger
GAP = 6
LABEL_WIDTH = 120
BAR_WIDTH = 160
INK, FAINT, PAPER = (28, 28, 34), (120, 120, 130), (255, 255, 255)
BAR, EXTRA_BAR = (203, 71, 71), (96, 108, 200)
OUTLINE = (64, 240, 255)
HEAT = matplotlib.colormaps["inferno"]  # looking it up makes a copy


@dataclass
class HeadMaps:
    """Where each head looks."""

    frames: Tensor
    """(H, T, rows, columns) weights on the past frames, oldest first."""
    extra: Tensor | None
    """(H,) weight on the extra key; None where there is none."""


@dataclass
class Scene:
    """The frames behind the maps."""

    context: Tensor
    """(T, 3, H, W) uint8, past frames, oldest first."""
    context_mask: Tensor
    """(T,) bool, True where the frame exists."""
    target: Tensor
    """(3, H, W) uint8."""
    patch: tuple[int, int]
    """Row and column of the chosen target patch."""
    frame_names: Sequence[str] | None = None
    """What the frames of `context` are called; by default by their distance from the newest, see `frame_name`."""

    @property
    def names(self) -> list[str]:
        """What the frames of `context` are called."""
        frames = len(self.context)
        return list(self.frame_names or (frame_name(i, frames) for i in range(frames)))


def attention_figure(scene: Scene, chosen: HeadMaps, average: HeadMaps, title: str) -> Image.Image:
    """One layer at one diffusion time.

    From left to right: the target with the chosen patch outlined; on each past frame, where that patch looks (its own
    place outlined), and the mass per frame; the same for the average over all target patches. The first row shows the
    frames as they are, each further row a head.

    Maps are drawn blocky, one block a patch; frames are magnified to whole pixels. Colours of a row are scaled to the
    largest weight in it, printed at its left, for the chosen patch and for the average apart.
    """
    heads, frames, rows, columns = chosen.frames.shape
    size = cell_size(*scene.target.shape[-2:])
    width, height = size
    row_height = max(height, 14 * (frames + 1), 44) + GAP  # bars stay legible beside frames that are low
    names = scene.names
    headings = (
        f"where the outlined patch looks ({scene.patch[0]}, {scene.patch[1]})",
        f"mean over all {rows * columns} target patches",
    )
    heading_width = max(round(font(14, bold=True).getlength(heading)) for heading in headings)
    group_width = max(frames * (width + GAP) + BAR_WIDTH, heading_width) + GAP
    canvas_width = LABEL_WIDTH + width + 4 * GAP + 2 * (group_width + 2 * GAP)
    title_width = round(font(17, bold=True).getlength(title)) + 4 * GAP
    top = 86
    canvas = Image.new("RGB", (max(canvas_width, title_width), top + (heads + 1) * row_height + 2 * GAP), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((2 * GAP, 10), title, INK, font(17, bold=True))
    box = patch_box(scene.patch, (rows, columns), size)

    target_left = LABEL_WIDTH
    target = frame_image(scene.target, size)
    outline(ImageDraw.Draw(target), box)
    draw.text((target_left, top - 22), "target", INK, font(13))
    lefts = [target_left + width + 4 * GAP]
    lefts.append(lefts[0] + group_width + 2 * GAP)
    past = [frame_image(frame, size) for frame in scene.context]
    for left, heading in zip(lefts, headings, strict=True):
        draw.text((left, top - 44), heading, INK, font(14, bold=True))
        for i, name in enumerate(names):
            heading = f"frame {name}" if scene.frame_names is None else name
            draw.text((left + i * (width + GAP), top - 22), heading, INK, font(13))
            canvas.paste(past[i] if scene.context_mask[i] else missing_frame(size), (left + i * (width + GAP), top))
        bars_left = left + frames * (width + GAP) + GAP
        _colour_scale(draw, bars_left + 5, top + 4)
        draw.text((bars_left + 5, top + row_height - GAP - 16), "attention mass", INK, font(13))
    draw.text((2 * GAP, top + height // 2 - 10), "frames", INK, font(15, bold=True))
    canvas.paste(target, (target_left, top))

    for head in range(heads):
        y = top + (head + 1) * row_height
        peaks = [float(group.frames[head].max()) for group in (chosen, average)]
        draw.text((2 * GAP, y + (row_height - GAP) // 2 - 26), f"head {head}", INK, font(15, bold=True))
        for line, (name, peak) in enumerate(zip(("patch", "mean"), peaks, strict=True)):
            draw.text((2 * GAP, y + (row_height - GAP) // 2 - 4 + 15 * line), f"{name} max {peak:.2g}", FAINT, font(11))
        canvas.paste(target, (target_left, y))
        for group, peak, left in zip((chosen, average), peaks, lefts, strict=True):
            for i in range(frames):
                cell = missing_frame(size)
                if scene.context_mask[i]:
                    cell = heat_overlay(past[i], group.frames[head, i] / max(peak, 1e-30))
                    if group is chosen:
                        outline(ImageDraw.Draw(cell), box, thin=True)
                canvas.paste(cell, (left + i * (width + GAP), y))
            masses = {
                name: float(group.frames[head, i].sum()) if scene.context_mask[i] else None
                for i, name in enumerate(names)
            }
            if group.extra is not None:
                masses["extra"] = float(group.extra[head])
            _bars(draw, left + frames * (width + GAP) + GAP, y, row_height - GAP, masses)
    return canvas


def thumbnail(scene: Scene, maps: Tensor, height: int = 44) -> Image.Image:
    """Where the chosen patch looks, (T, rows, columns), over the frames side by side; missing ones are hatched."""
    size = (round(height * scene.target.shape[-1] / scene.target.shape[-2]), height)
    canvas = Image.new("RGB", (len(maps) * (size[0] + 2) - 2, height), PAPER)
    for i, heat in enumerate(maps):
        cell = missing_frame(size)
        if scene.context_mask[i]:
            cell = heat_overlay(frame_image(scene.context[i], size), heat / max(float(maps.max()), 1e-30))
            outline(ImageDraw.Draw(cell), patch_box(scene.patch, tuple(heat.shape), size), thin=True)
        canvas.paste(cell, (i * (size[0] + 2), 0))
    return canvas


def frame_name(index: int, frames: int) -> str:
    """Frames are named by their distance from the current one: …, −2, −1, 0."""
    back = frames - 1 - index
    return f"−{back}" if back else "0"


def cell_size(height: int, width: int) -> tuple[int, int]:
    """(width, height) of a drawn frame."""
    longest = max(height, width)
    factor = max(1, round(CELL / longest)) if longest <= LARGEST else LARGEST / longest
    return max(1, round(width * factor)), max(1, round(height * factor))


def frame_image(frame: Tensor, size: tuple[int, int]) -> Image.Image:
    """A frame (3, H, W) uint8 at a size (width, height)."""
    image = Image.fromarray(frame.permute(1, 2, 0).cpu().numpy())
    return image.resize(size, Image.Resampling.NEAREST if size[0] >= image.width else Image.Resampling.BOX)


def heat_overlay(frame: Image.Image, heat: Tensor) -> Image.Image:
    """The frame in grey, under a heat map (rows, columns) in [0, 1] that covers it the more the hotter it is."""
    heat_image = Image.fromarray(heat.cpu().numpy().astype(np.float32)).resize(frame.size, Image.Resampling.NEAREST)
    heat_HW = np.asarray(heat_image)
    colour = HEAT(0.15 + 0.85 * heat_HW)[..., :3]
    grey = np.asarray(ImageOps.autocontrast(frame.convert("L")), dtype=np.float32)[..., None] / 255
    cover = (0.35 + 0.5 * np.sqrt(heat_HW))[..., None]
    return Image.fromarray(np.uint8(255 * ((1 - cover) * grey + cover * colour) + 0.5))


def missing_frame(size: tuple[int, int]) -> Image.Image:
    """What stands for a frame that does not exist."""
    image = Image.new("RGB", size, (236, 236, 240))
    draw = ImageDraw.Draw(image)
    for x in range(-size[1], size[0], 12):
        draw.line([(x, size[1]), (x + size[1], 0)], (216, 216, 222), 2)
    draw.text((size[0] / 2, size[1] / 2), "missing", FAINT, font(13), anchor="mm")
    return image


def patch_box(patch: tuple[int, int], grid: tuple[int, int], size: tuple[int, int]) -> tuple[float, ...]:
    """Left, top, right and bottom pixel of a patch."""
    (row, column), (rows, columns), (width, height) = patch, grid, size
    return (
        round(column * width / columns),
        round(row * height / rows),
        round((column + 1) * width / columns) - 1,
        round((row + 1) * height / rows) - 1,
    )


def outline(draw: ImageDraw.ImageDraw, box: tuple[float, ...], thin: bool = False) -> None:
    """A box that shows on any picture: two-coloured around it, or thin on its edge."""
    left, top, right, bottom = box
    if not thin:
        draw.rectangle((left - 3, top - 3, right + 3, bottom + 3), outline=(0, 0, 0))
        draw.rectangle((left - 2, top - 2, right + 2, bottom + 2), outline=OUTLINE, width=2)
    else:
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=OUTLINE)


def _bars(draw: ImageDraw.ImageDraw, left: int, top: int, height: int, masses: dict[str, float | None]) -> None:
    """Horizontal bars from 0 to 1 with their values; None is a missing frame."""
    step = min(22, height // len(masses))
    small = font(min(11, step))
    top += (height - step * len(masses)) // 2
    bar_left, bar_width = left + 34, BAR_WIDTH - 34 - 40
    for line, (name, mass) in enumerate(masses.items()):
        y = top + line * step
        middle = y + step / 2
        draw.text((bar_left - 5, middle), name, INK, small, anchor="rm")
        draw.rectangle((bar_left, y + 2, bar_left + bar_width, y + step - 3), (238, 238, 242))
        if mass:
            colour = EXTRA_BAR if name == "extra" else BAR
            draw.rectangle((bar_left, y + 2, bar_left + round(bar_width * mass), y + step - 3), colour)
        value = "missing" if mass is None else f"{mass:.2f}"
        draw.text((bar_left + bar_width + 4, middle), value, FAINT if mass is None else INK, small, anchor="lm")


def _colour_scale(draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
    draw.text((left, top), "0", FAINT, font(11))
    left, width = left + 12, 60
    for x in range(width):
        colour = HEAT(0.15 + 0.85 * x / (width - 1), bytes=True)
        draw.line([(left + x, top + 1), (left + x, top + 11)], tuple(int(c) for c in colour[:3]))
    draw.text((left + width + 5, top), "row's largest", FAINT, font(11))


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font of all pictures."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
