"""Pictures of one layer's attention over the frames: a figure of all heads, and a small picture of each."""

from PIL import Image
from torch import Tensor

from cdit.heads.config import Kind
from cdit.heads.figures import HeadMaps, Scene, attention_figure, thumbnail
from cdit.heads.measures import Layout, frame_maps

TITLES = {"cross": "cross-attention to the past", "self": "self-attention within the target"}


def overlay(
    weights: Tensor, layout: Layout, scene: Scene, kind: Kind, layer: int, time: float, where: str
) -> tuple[Image.Image, str]:
    """Figure and caption of the weights (H, N, M[+1]) of one target.

    Args:
        weights: on any device.
        layout: of what is looked at.
        scene: the frames behind, and the chosen patch.
        kind: which attention.
        layer: which block.
        time: the diffusion time.
        where: names the sample and its goal.
    """
    heads, has_extra = len(weights), weights.shape[-1] > layout.frames * layout.patches
    row, column = scene.patch
    title = f"Layer {layer} · {TITLES[kind]} · diffusion time t = {time:g} · {where}"
    chosen = _maps(weights[:, row * layout.columns + column], layout)
    figure = attention_figure(scene, chosen, _maps(weights.mean(1), layout), title)
    looked_at = f"frames {scene.names[0]} to {scene.names[-1]}" if kind == "cross" else "the target itself"
    caption = (
        f"layer {layer}, {TITLES[kind]}, heads 0 to {heads - 1} (rows), diffusion time {time:g}, {looked_at} (columns),"
        f" {where}. Left: target, patch (row {row}, column {column}) outlined; where it looks; where all "
        f"{layout.patches} patches look on average. Bars: attention mass per frame"
        f"{' and on the extra key' if has_extra else ''}. Each row's colours run from 0 to its largest weight, for the "
        "patch and for the mean apart. One block is one patch."
    )
    return figure, caption


def thumbnails(weights: Tensor, layout: Layout, scene: Scene) -> list[Image.Image]:
    """For each head, where the chosen patch looks: the frames side by side. Weights as in `overlay`."""
    row, column = scene.patch
    maps = _maps(weights[:, row * layout.columns + column], layout)
    return [thumbnail(scene, maps.frames[head]) for head in range(len(weights))]


def _maps(weights: Tensor, layout: Layout) -> HeadMaps:
    """Of weights (H, M[+1])."""
    weights = weights.float().cpu()
    has_extra = weights.shape[-1] > layout.frames * layout.patches
    return HeadMaps(frame_maps(weights, layout), weights[:, -1] if has_extra else None)
