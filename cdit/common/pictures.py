"""Pictures and videos of frames: labelled grids and strips as Pillow images, MP4 and GIF."""

import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cdit.common.charts import font
from cdit.common.frames import to_uint8

CELL = 128
"""Frames narrower than this are magnified, by a whole factor, to about this many pixels."""

GAP = 6
INK, FAINT, PAPER, EMPTY = "#1c1c22", "#787882", "#ffffff", "#f0f2f4"


def to_image(frame: Tensor, scale: int | None = None) -> Image.Image:
    """A frame (3, H, W), uint8 or float in [-1, 1], as an image magnified `scale` times (see `CELL`), pixels square."""
    image = Image.fromarray(to_uint8(frame).permute(1, 2, 0).cpu().contiguous().numpy())
    scale = scale or max(1, round(CELL / image.width))
    return image if scale == 1 else image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def comparison_grid(
    context: Tensor,
    truth: Tensor | None,
    prediction: Tensor,
    horizons: Sequence[str],
    rows: Sequence[str] = (),
    scale: int | None = None,
) -> Image.Image:
    """Last context frame and, for every horizon, truth beside prediction; a row for each sample.

    Args:
        context: (B, T, 3, H, W), or (B, 3, H, W) for the last frames alone.
        truth: (B, G, 3, H, W); None if unknown.
        prediction: (B, G, 3, H, W).
        horizons: G labels, such as "1 s".
        rows: B labels at the left, if any.
        scale: see `to_image`.

    Frames are uint8, or float in [-1, 1].
    """
    last = context[:, -1] if context.ndim == 5 else context
    columns = [("", "last seen", last)]
    for goal, horizon in enumerate(horizons):
        columns += [] if truth is None else [(horizon, "truth", truth[:, goal])]
        columns += [(horizon, "predicted", prediction[:, goal])]
    cells = [[to_image(column[sample], scale) for *_, column in columns] for sample in range(len(prediction))]
    labels = [(row,) for row in rows]
    return sheet("", "", [label for _, label, _ in columns], labels, cells, [group for group, *_ in columns])


def strip(
    context: Tensor,
    truth: Tensor | None,
    prediction: Tensor,
    fps: float,
    context_mask: Tensor | None = None,
    columns: int = 8,
    scale: int | None = None,
) -> Image.Image:
    """One future: the context, then truth above prediction.

    Args:
        context: (T, 3, H, W), oldest first.
        truth: (L, 3, H, W) following the context; None if unknown.
        prediction: (L, 3, H, W).
        fps: frames per second, for the labels.
        context_mask: (T,), False where a context frame is missing and its cell stays empty.
        columns: the largest number of future frames to show, every n-th up to the last.
        scale: see `to_image`.

    Frames are uint8, or float in [-1, 1].
    """
    past, length = len(context), len(prediction)
    shown = range(length - 1, -1, -math.ceil(length / columns))[::-1]
    groups = ["past"] * past + ["future"] * len(shown)
    headers = [_seconds((i - past + 1) / fps) for i in range(past)] + [_seconds((i + 1) / fps) for i in shown]
    seen = [to_image(frame, scale) for frame in context]
    if context_mask is not None:
        seen = [x if exists else Image.new("RGB", x.size, EMPTY) for x, exists in zip(seen, context_mask, strict=True)]
    futures = {"predicted": prediction} if truth is None else {"truth": truth, "predicted": prediction}
    cells: list[list[Image.Image | None]] = []
    for future in futures.values():
        cells.append([*(seen if not cells else [None] * past), *(to_image(future[i], scale) for i in shown)])
    return sheet("", "", headers, [(name,) for name in futures], cells, groups)


def rollout_video(
    context: Tensor,
    truth: Tensor | None,
    prediction: Tensor,
    fps: float,
    scale: int | None = None,
) -> Iterator[Image.Image]:
    """The frames of a video: the context, then truth beside prediction, with the time below.

    Args:
        context: (T, 3, H, W), the frames that exist, oldest first.
        truth: (L, 3, H, W); None if unknown, in which case only the prediction is shown.
        prediction: (L, 3, H, W).
        fps: frames per second, for the labels.
        scale: see `to_image`; by default twice as large as in a grid.

    Yields:
        T + L images of one size. Frames are uint8, or float in [-1, 1].
    """
    scale = scale or max(1, round(2 * CELL / context.shape[-1]))
    names = ["predicted"] if truth is None else ["truth", "predicted"]
    for i in range(len(context) + len(prediction)):
        future = i - len(context)
        time = _seconds((future + 1) / fps)
        if future < 0:
            panels = [context[i]] * len(names)
        else:
            panels = [prediction[future]] if truth is None else [truth[future], prediction[future]]
        cells = [[to_image(panel, scale) for panel in panels]]
        yield sheet("", "", names, [], cells, footer=time if future >= 0 else f"given, {time}")


def save_mp4(frames: Iterable[Image.Image] | Tensor, path: Path | str, fps: float) -> None:
    """Writes an MP4 that browsers and W&B play: H.264, or MPEG-4 if FFmpeg was built without it.

    Args:
        frames: images of one size, or a tensor (T, 3, H, W), uint8 or float in [-1, 1]. An odd side gains a pixel.
        path: the file.
        fps: frames per second.
    """
    images = iter(_images(frames))
    first = next(images)
    width, height = first.size
    pad = ((0, height % 2), (0, width % 2), (0, 0))  # chroma is stored at half the resolution
    with av.open(str(path), "w", format="mp4") as container:
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        stream.options = {"crf": "16"} if codec == "libx264" else {"qscale": "2"}
        for image in chain([first], images):
            array = np.asarray(image.convert("RGB"))
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.pad(array, pad, "edge"), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def save_gif(frames: Iterable[Image.Image] | Tensor, path: Path | str, fps: float) -> None:
    """Writes a looping GIF; arguments as for `save_mp4`. Its time unit is a hundredth of a second."""
    first, *rest = _images(frames)
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, disposal=1)


def _images(frames: Iterable[Image.Image] | Tensor) -> Iterable[Image.Image]:
    return (to_image(frame, scale=1) for frame in frames) if isinstance(frames, Tensor) else frames


def _seconds(time: float) -> str:
    return "now" if time == 0 else f"{time:+.2f}".rstrip("0").rstrip(".").replace("-", "−") + " s"


def sheet(
    title: str,
    subtitle: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    cells: Sequence[Sequence[Image.Image | None]],
    spans: Sequence[str] = (),
    gap: int = GAP,
    footer: str = "",
) -> Image.Image:
    """A table of images with headings.

    Args:
        title: in bold at the top; with the subtitle left out if empty.
        subtitle: below it.
        columns: headings.
        rows: lines of text at the left of each row, if any; the first is bold if there are several.
        cells: images; columns are as wide and rows as high as the largest. None: blank.
        spans: a heading for each column, written once above neighbours that share it; others are set apart.
        gap: between cells.
        footer: centred below the table.
    """
    rows, spans = rows or [()] * len(cells), spans or [""] * len(columns)
    labels = [list(zip(lines, _faces(len(lines)), strict=True)) for lines in rows]
    x = 2 * GAP + max((2 * GAP + _width(*label) for lines in labels for label in lines), default=0)
    lefts, headings, end = [], [], 0
    for i, column in enumerate(columns):
        if i and spans[i] != spans[i - 1]:
            x = max(x + 4 * GAP, end + 2 * GAP)
        if not i or spans[i] != spans[i - 1]:
            headings.append((x, spans[i]))
            end = x + _width(spans[i], font(13, bold=True))
        lefts.append(x)
        x += max(max(line[i].width for line in cells if line[i]), _width(column, font(12))) + gap
    width = max(x, end, 2 * GAP + max(_width(title, font(17, bold=True)), _width(subtitle, font(12))))
    span_top = 62 if title else 8
    column_top = span_top + (24 if any(spans) else 0)
    tops = [column_top + 22]
    for lines, line in zip(rows, cells, strict=True):
        tops.append(tops[-1] + max(16 * len(lines), *(cell.height for cell in line if cell)) + gap)
    canvas = Image.new("RGB", (width + 2 * GAP, tops[-1] + GAP + (20 if footer else 0)), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((2 * GAP, 8), title, INK, font(17, bold=True))
    draw.text((2 * GAP, 34), subtitle, FAINT, font(12))
    for left, heading in headings:
        draw.text((left, span_top), heading, INK, font(13, bold=True))
    for left, column in zip(lefts, columns, strict=True):
        draw.text((left, column_top), column, INK, font(12))
    for i, line in enumerate(cells):
        middle = (tops[i] + tops[i + 1] - gap) / 2
        for j, (label, face) in enumerate(labels[i]):
            y = middle + 16 * (j - (len(labels[i]) - 1) / 2)
            draw.text((2 * GAP, y), label, FAINT if j else INK, face, anchor="lm")
        for left, cell in zip(lefts, line, strict=True):
            if cell:
                canvas.paste(cell, (left, round(middle - cell.height / 2)))
    draw.text((canvas.width / 2, canvas.height - 14), footer, FAINT, font(12), anchor="mm")
    return canvas


def _faces(lines: int) -> list[ImageFont.FreeTypeFont]:
    first = font(13, bold=True) if lines > 1 else font(12)
    return [first, *[font(11)] * (lines - 1)][:lines]


def _width(text: str, face: ImageFont.FreeTypeFont) -> int:
    return math.ceil(face.getlength(text))
