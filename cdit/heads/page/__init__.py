"""The interactive page of attention heads: one HTML file that needs no server and no network.

`AttentionPage` gathers frames, weights and measures and writes the file; `compress` packs the weights. The browser runs
decode.js, drawing.js, heads.js and page.js, which are inlined together with page.html and page.css.

A layer's weights are one zlib stream of two sections of the same form: its rows (a head's target patches, heads
slowest) with the `top_k` largest weights on past frames each, and each head's mean over the target patches in full. A
section is a sequence of planes of bytes; each plane goes through all rows before the next one begins:

    peak, low byte; high byte   largest weight on a past frame, 16 bits on a square-root scale: w = (q / 65535)²
    mass of each past frame     T planes, w = q / 255
    mass of the extra key       only if there is one, w = q / 255
    values                      kept weights in the order of their tokens, w = peak · (q / 255)²
    gaps, low bytes; high       distance of a kept token from the one before (the first: from -1)

The square-root scale gives small weights, of which there are many, smaller steps: decoding returns a kept weight w of
a row with the peak p up to an error of √(w·p) / 255 + p / 510² from its own rounding and √p / 65535 + 1 / 131070² from
the peak's. Masses are of the full weights, so that the remainder of each frame is known (error 1 / 510).
"""

import base64
import html
import io
import math
import zlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cdit.common.files import to_json
from cdit.heads.head_statistics import HeadRow
from cdit.heads.measures import Layout, extra_share, frame_mass

SCRIPTS = ("decode.js", "drawing.js", "heads.js", "page.js")
PIXEL_ART = 128
"""Frames up to this wide are stored losslessly and shown with sharp pixels."""


class AttentionPage:
    """A page that shows where each head of each layer attends, for every target patch.

    Filled piece by piece, so that at most one layer's weights are held: `add_sample` for each sample, `add_weights` for
    each of its denoising times and layers (the same times, layers and heads for all samples), then `set_heads`.

    Args:
        top_k: number of weights kept for each target patch, the largest; all by default. See `affordable_top_k`. The
            remainder is shown spread evenly over its frame, and the page says how much it is.
    """

    def __init__(self, title: str, layout: Layout, fps: float, has_extra: bool, top_k: int | None = None):
        keys = layout.frames * layout.patches
        self.title, self.layout = title, layout
        self.kept = min(top_k or keys, keys)
        self._data: dict[str, Any] = {**layout._asdict(), "fps": fps, "extra": has_extra, "kept": self.kept}
        self._data |= {"heads": 0, "samples": [], "table": [], "explanations": {}}
        self._weights: dict[tuple[int, float, int], str] = {}

    def add_sample(
        self,
        name: str,
        context: Tensor,
        context_mask: Tensor,
        target: Tensor,
        prediction: Tensor | None = None,
        places: Tensor | None = None,
    ) -> int:
        """Adds the frames of a sample.

        Args:
            name: shown where the sample is chosen.
            context: (T, 3, H, W) uint8, past frames, oldest first.
            context_mask: (T,) bool, True where the frame exists.
            target: (3, H, W) uint8, the true frame.
            prediction: (3, H, W) uint8, the predicted one.
            places: (N, T, 2), the true place of what a target patch shows in each past frame: row and column in
                patches, patch (r, c) being [r, r + 1) × [c, c + 1); NaN if it is not visible or unknown.

        Returns:
            The sample's number, for `add_weights`.
        """
        if places is not None:
            places = [
                [None if math.isnan(place[0]) else [round(x, 2) for x in place] for place in patch]
                for patch in places.tolist()
            ]
        self._data["samples"].append({
            "name": name,
            "context": [_data_uri(x) if exists else None for x, exists in zip(context, context_mask, strict=True)],
            "target": _data_uri(target),
            "prediction": None if prediction is None else _data_uri(prediction),
            "correspondence": places,
        })  # fmt: skip
        self._data |= {"aspect": target.shape[-1] / target.shape[-2], "pixelated": target.shape[-1] <= PIXEL_ART}
        return len(self._data["samples"]) - 1

    def add_weights(self, sample: int, layer: int, time: float, weights: Tensor) -> None:
        """Adds a layer's weights (heads, N, M[+1]) of a sample at a denoising time; only compressed bytes are kept."""
        self._data["heads"] = len(weights)
        self._weights[sample, time, layer] = base64.b64encode(compress(weights, self.layout, self.kept)).decode()

    def set_heads(self, rows: Sequence[HeadRow], measures: Sequence[str], explanations: Mapping[str, str]) -> None:
        """Fills the table of heads.

        Args:
            rows: in the initial order of the table; their times are those of `add_weights`.
            measures: names of the measures to show, in the order of the columns.
            explanations: of measures and types, a sentence by name; the page lists them.
        """
        self._data["explanations"] = dict(explanations)
        self._data["table"] = [
            {
                "layer": row.layer,
                "head": row.head,
                "time": row.time,
                "type": row.type.name,
                "reason": row.type.reason,
                "measures": {name: row.measures[name].mean for name in measures},
            }
            for row in rows
        ]

    def html(self) -> str:
        """The page, for `wandb.Html(page.html(), inject=False)`: what W&B would inject needs the network.

        Raises:
            ValueError: weights of some sample, time and layer were not added.
        """
        times, layers = (sorted({key[i] for key in self._weights}) for i in (1, 2))
        samples = range(len(self._data["samples"]))
        keys = [(sample, time, layer) for sample in samples for time in times for layer in layers]
        if missing := set(keys) - set(self._weights):
            raise ValueError(f"no weights were added for (sample, time, layer) = {sorted(missing)}")
        data = self._data | {"times": times, "layers": layers, "weights": [self._weights[key] for key in keys]}
        files = resources.files(__package__)
        page = files.joinpath("page.html").read_text("utf-8")
        scripts = [files.joinpath(name).read_text("utf-8") for name in SCRIPTS]
        for place, content in {
            "<!-- title -->": html.escape(self.title),
            "<!-- style -->": f"<style>\n{files.joinpath('page.css').read_text('utf-8')}</style>",
            "<!-- data -->": f'<script id="data" type="application/json">{_json(data)}</script>',
            "<!-- script -->": '<script type="module">\n' + "\n".join(scripts) + "</script>",
        }.items():
            page = page.replace(place, content)
        return page

    def save(self, path: Path | str) -> None:
        """Writes the page."""
        Path(path).write_text(self.html(), "utf-8")


def _json(value: Any) -> str:
    """JSON that cannot end the script element that contains it."""
    return to_json(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _data_uri(frame: Tensor) -> str:
    image, buffer = Image.fromarray(frame.permute(1, 2, 0).cpu().contiguous().numpy()), io.BytesIO()
    kind = "png" if image.width <= PIXEL_ART else "jpeg"
    image.save(buffer, kind, **({"optimize": True} if kind == "png" else {"quality": 90}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def compress(weights: Tensor, layout: Layout, top_k: int) -> bytes:
    """Weights (H, N, M[+1]) of a layer as bytes; see the module's docstring."""
    weights = weights.float().cpu()
    keys = layout.frames * layout.patches
    rows = _section(weights, layout, min(top_k, keys))
    means = _section(weights.mean(1, keepdim=True), layout, keys)
    return zlib.compress(rows + means, 9)


def affordable_top_k(layout: Layout, maps: int, size: float = 4.5e6) -> int:
    """The largest `top_k` with which a page's weights fit in `size` bytes, at least 1.

    Args:
        maps: samples · times · layers · heads on the page.
        size: bytes of the file (base64), without frames.

    Values are counted with 8 bits, gaps with a tenth more than the entropy of the places if every choice of tokens were
    equally likely; trained heads need less.
    """
    keys = layout.frames * layout.patches
    # Base64 writes 3 bytes as 4; a map has a row for each patch, and the mean's, which keeps all.
    row_bytes = (size * 3 / 4 / maps - keys) / (layout.patches + 1) - (layout.frames + 3)
    return max((k for k in range(1, keys + 1) if k + _gap_bytes(k, keys) <= row_bytes), default=1)


def _gap_bytes(kept: int, keys: int) -> float:
    share = np.array([kept / keys, 1 - kept / keys])
    return 1.1 / 8 * keys * -(share * np.log2(share, where=share > 0, out=np.zeros(2))).sum()


def _section(weights: Tensor, layout: Layout, kept: int) -> bytes:
    keys = layout.frames * layout.patches
    on_frames = weights[..., :keys]
    peak = on_frames.amax(-1, keepdim=True)
    place = on_frames.topk(kept).indices.sort().values
    relative = on_frames.gather(-1, place) / peak.clamp(min=torch.finfo(torch.float32).tiny)
    gap = place.diff(prepend=torch.full_like(place[..., :1], -1))
    peak = (peak.sqrt() * 65535).round().long()
    masses = [frame_mass(weights, layout)]
    if weights.shape[-1] > keys:
        masses.append(extra_share(weights, layout)[..., None])
    planes = [
        *(peak & 255, peak >> 8),
        *((mass * 255).round() for group in masses for mass in group.unbind(-1)),
        *((relative.sqrt() * 255).round(), gap & 255, gap >> 8),
    ]
    return b"".join(plane.numpy().astype(np.uint8).tobytes() for plane in planes)
