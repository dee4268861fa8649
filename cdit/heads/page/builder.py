"""Gathers what the page shows, one layer at a time, and writes the file."""

import base64
import html
import io
import json
import math
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from cdit.heads.measures import Layout
from cdit.heads.page.compression import compress

SCRIPTS = ("decode.js", "drawing.js", "heads.js", "page.js")
PIXEL_ART = 128
"""Frames up to this wide are stored without loss and shown with sharp pixels."""


@dataclass
class HeadInfo:
    """A head's line in the table."""

    layer: int
    head: int
    type: str = ""
    """What the head does, in a word or two, shown as a tag; empty for none."""
    measures: dict[str, float] = field(default_factory=dict)
    """Numbers by name; the names become columns that the table can be sorted by. NaN where there is none."""
    time: float | None = None
    """The denoising time at which this holds, equal to one of `AttentionPage.add_weights`; None for all of them."""
    reason: str = ""
    """Why it has this type; shown as the tag is pointed at."""


class AttentionPage:
    """A page on which to see where each head of each layer looks, for every target patch.

    Fed piece by piece, so that no more than one layer's weights need be held: `add_sample` for each sample, then
    `add_weights` for each of its denoising times and layers (the same times, layers and heads for all samples).

    Args:
        title: shown at the top.
        layout: of the past frames' tokens.
        fps: frames a second, for the labels.
        has_extra: whether weights have an extra key at the end.
        top_k: weights kept for each target patch, the largest; by default all. See `affordable_top_k`. What is not
            kept is shown spread evenly over its frame, and the page says how much that is.
    """

    def __init__(self, title: str, layout: Layout, fps: float, has_extra: bool, top_k: int | None = None):
        keys = layout.frames * layout.patches
        self.title, self.layout = title, layout
        self.kept = min(top_k or keys, keys)
        self._facts = {**layout._asdict(), "fps": fps, "extra": has_extra, "kept": self.kept}
        self._samples: list[dict[str, Any]] = []
        self._weights: dict[tuple[int, float, int], str] = {}
        self._heads: list[HeadInfo] = []
        self._explanations: dict[str, str] = {}
        self._heads_per_layer = 0

    def add_sample(
        self,
        name: str,
        context: Tensor,
        context_mask: Tensor,
        target: Tensor,
        prediction: Tensor | None = None,
        correspondence: Tensor | None = None,
    ) -> int:
        """Adds frames to look at.

        Args:
            name: shown where the sample is chosen.
            context: (T, 3, H, W) uint8, past frames, oldest first.
            context_mask: (T,) bool, True where the frame exists.
            target: (3, H, W) uint8, the true frame.
            prediction: (3, H, W) uint8, the predicted one.
            correspondence: (N, T, 2), where what a target patch shows truly is in each past frame: row and column
                in patches, patch (r, c) being [r, r + 1) × [c, c + 1); NaN where it is hidden, outside or unknown.

        Returns:
            The sample's number, for `add_weights`.
        """
        places = None
        if correspondence is not None:
            places = [
                [None if math.isnan(place[0]) else [round(x, 2) for x in place] for place in patch]
                for patch in correspondence.tolist()
            ]
        self._samples.append(
            {
                "name": name,
                "context": [
                    _data_uri(frame) if exists else None for frame, exists in zip(context, context_mask, strict=True)
                ],
                "target": _data_uri(target),
                "prediction": None if prediction is None else _data_uri(prediction),
                "correspondence": places,
            }
        )
        self._facts |= {"aspect": target.shape[-1] / target.shape[-2], "pixelated": target.shape[-1] <= PIXEL_ART}
        return len(self._samples) - 1

    def add_weights(self, sample: int, layer: int, time: float, weights: Tensor) -> None:
        """Adds a layer's weights (heads, N, M[+1]) of a sample at a denoising time; only their bytes are kept."""
        self._heads_per_layer = len(weights)
        self._weights[sample, time, layer] = base64.b64encode(compress(weights, self.layout, self.kept)).decode()

    def set_heads(self, heads: list[HeadInfo], explanations: dict[str, str] | None = None) -> None:
        """The table of heads.

        Args:
            heads: in the order in which the table first shows them.
            explanations: of measures and types, a sentence by name; the page lists them.
        """
        self._heads, self._explanations = heads, explanations or {}

    def html(self) -> str:
        """The page, for `wandb.Html(page.html(), inject=False)`: what W&B would inject needs the network.

        Raises:
            ValueError: weights of some sample, time and layer were not added.
        """
        times, layers = (sorted({key[i] for key in self._weights}) for i in (1, 2))
        keys = [(sample, time, layer) for sample in range(len(self._samples)) for time in times for layer in layers]
        if missing := set(keys) - set(self._weights):
            raise ValueError(f"no weights were added for (sample, time, layer) = {sorted(missing)}")
        heads = range(self._heads_per_layer)
        table = self._heads or [HeadInfo(layer, head) for layer in layers for head in heads]
        data = self._facts | {
            "times": times,
            "layers": layers,
            "heads": len(heads),
            "samples": self._samples,
            "weights": [self._weights[key] for key in keys],
            "table": [asdict(info) for info in table],
            "explanations": self._explanations,
        }
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

    def save(self, path: Path | str) -> int:
        """Writes the page, making its folder where needed; returns its size in bytes."""
        path = Path(path)
        content = self.html().encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return len(content)


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in; NaN and infinities, which JSON lacks, become null."""
    return json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _data_uri(frame: Tensor) -> str:
    image, buffer = Image.fromarray(frame.permute(1, 2, 0).cpu().contiguous().numpy()), io.BytesIO()
    if image.width <= PIXEL_ART:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=90)
    kind = "png" if image.width <= PIXEL_ART else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
