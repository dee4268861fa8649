"""Pictures and videos of frames: labelled grids and strips as Pillow images, MP4 and GIF."""

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cdit.common.frames import to_uint8

CELL = 128
"""Frames narrower than this are magnified, by a whole factor, to about this many pixels."""

BACKGROUND, INK, FAINT, EMPTY = "#ffffff", "#1f2328", "#7d8590", "#f0f2f4"
GAP, GROUP_GAP, MARGIN = 4, 16, 12
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


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
    return _table(cells, [group for group, *_ in columns], [label for _, label, _ in columns], rows)


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
        columns: the largest number of future frames to show, evenly spaced, including the last.
        scale: see `to_image`.

    Frames are uint8, or float in [-1, 1].
    """
    past, length = len(context), len(prediction)
    shown = np.unique(np.linspace(length / min(columns, length), length, min(columns, length)).round().astype(int)) - 1
    groups = ["past"] * past + ["future"] * len(shown)
    headers = [_seconds((i - past + 1) / fps) for i in range(past)] + [_seconds((i + 1) / fps) for i in shown]
    seen = [
        to_image(frame, scale) if context_mask is None or context_mask[i] else None for i, frame in enumerate(context)
    ]
    futures = {"predicted": prediction} if truth is None else {"truth": truth, "predicted": prediction}
    cells: list[list[Image.Image | None]] = []
    for future in futures.values():
        cells.append([*(seen if not cells else [None] * past), *(to_image(future[i], scale) for i in shown)])
    return _table(cells, groups, headers, list(futures), blanks_are_empty=True)


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
    for i in range(len(context) + len(prediction)):
        future = i - len(context)
        if future < 0:
            panels, headers = [context[i]] * (1 if truth is None else 2), ["given"] * (1 if truth is None else 2)
        elif truth is None:
            panels, headers = [prediction[future]], ["predicted"]
        else:
            panels, headers = [truth[future], prediction[future]], ["truth", "predicted"]
        cells = [[to_image(panel, scale) for panel in panels]]
        yield _table(cells, [], headers, [], footer=_seconds((future + 1) / fps))


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


def _table(
    cells: Sequence[Sequence[Image.Image | None]],
    groups: Sequence[str],
    headers: Sequence[str],
    rows: Sequence[str],
    blanks_are_empty: bool = False,
    footer: str = "",
) -> Image.Image:
    """Images of one size in rows and columns with headers; neighbouring columns of one group share its header.

    A None is a cell without image: grey, or white if `blanks_are_empty` and the whole column's lower rows are blank.
    """
    cell = next(image for row in cells for image in row if image is not None)
    size = 12 if cell.width >= 96 else 10
    font, line = ImageFont.truetype(FONT, size), size + 8
    starts_group = [bool(groups) and i > 0 and groups[i] != groups[i - 1] for i in range(len(headers))]
    left = MARGIN + (10 + int(max(font.getlength(label) for label in rows)) if rows else 0)
    xs, x = [], left
    for starts in starts_group:
        x += GROUP_GAP - GAP if starts else 0
        xs.append(x)
        x += cell.width + GAP
    top = MARGIN + line * (2 if any(groups) else 1)
    bottom = top + len(cells) * (cell.height + GAP) - GAP
    image = Image.new("RGB", (x - GAP + MARGIN, bottom + (line if footer else 0) + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(image)

    for i, header in enumerate(headers):
        draw.text((xs[i] + cell.width / 2, top - line / 2 - 1), header, FAINT if any(groups) else INK, font, "mm")
        if any(groups) and groups[i] and (i == 0 or starts_group[i]):
            last = next((j for j in range(i, len(groups)) if j + 1 == len(groups) or starts_group[j + 1]), i)
            middle = (xs[i] + xs[last] + cell.width) / 2
            draw.text((middle, MARGIN + line / 2 - 2), groups[i], INK, font, "mm")
            draw.line((xs[i], MARGIN + line - 2, xs[last] + cell.width - 1, MARGIN + line - 2), "#d0d7de")
    for r, row in enumerate(cells):
        y = top + r * (cell.height + GAP)
        if rows:
            draw.text((MARGIN, y + cell.height / 2), rows[r], INK, font, "lm")
        for x, content in zip(xs, row, strict=True):
            if content is not None:
                image.paste(content, (x, y))
            elif not (blanks_are_empty and r):
                draw.rectangle((x, y, x + cell.width - 1, y + cell.height - 1), EMPTY)
    if footer:
        draw.text((image.width / 2, bottom + line / 2 + 2), footer, FAINT, font, "mm")
    return image
