"""Draws samples of a probe set while their attention runs by: figures, small pictures, and the page."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from cdit.heads.config import Kind
from cdit.heads.examples import Example, examples_figure, one_of_each_type
from cdit.heads.figures import Scene
from cdit.heads.measures import Layout, frame_maps
from cdit.heads.overlays import overlay, thumbnails
from cdit.heads.page import AttentionPage
from cdit.heads.recording import LayerAttention
from cdit.heads.table import HeadLine


@dataclass
class Drawings:
    """What is drawn of one kind of attention. Only the first `drawn` samples are; of them no weights are kept."""

    batch: dict[str, Tensor]
    """Stacked items, of the past frames that the model looks at."""
    layout: Layout
    kind: Kind
    patch: tuple[int, int]
    """Row and column of the patch from which figures look."""
    drawn: int
    figure_layers: Collection[int]
    """Of which layers there are figures; the page has all."""
    page: AttentionPage | None = None
    images: dict[str, tuple[Image.Image, str]] = field(default_factory=dict)
    small: dict[tuple[int, float, int], Image.Image] = field(default_factory=dict)
    """By layer, time and head, of the first sample and goal."""
    looks: dict[tuple[int, float], Tensor] = field(default_factory=dict)
    """By layer and time, (H, T, rows, columns): where the chosen patch of the first sample and goal looks."""

    @property
    def goals(self) -> list[int]:
        """Which goals the page shows: the first and the last."""
        return sorted({0, self.batch["target"].shape[1] - 1})

    def add_samples(self, predictions: Tensor, places: Tensor | None) -> None:
        """Shows the drawn samples' frames on the page.

        Args:
            predictions: (drawn, G, 3, H, W) uint8.
            places: (S, G, N, T, 2) of `true_places`.
        """
        for sample in range(self.drawn):
            for goal in self.goals:
                self.page.add_sample(
                    self._where(sample, goal),
                    self.batch["context"][sample].cpu(),
                    self.batch["context_mask"][sample].cpu(),
                    self.batch["target"][sample, goal].cpu(),
                    predictions[sample, goal],
                    None if places is None else places[sample, goal],
                )

    def watch(self, sample: int, time: float, attention: LayerAttention) -> None:
        """Draws what runs by."""
        if sample >= self.drawn:
            return
        weights, layer = attention.weights()[0], attention.layer
        if self.page is not None:
            for number, goal in enumerate(self.goals):
                self.page.add_weights(sample * len(self.goals) + number, layer, time, weights[goal])
        scene = self._scene(sample)
        if sample == 0:
            row, column = self.patch
            chosen = weights[0, :, row * self.layout.columns + column]
            self.looks[layer, time] = frame_maps(chosen, self.layout).float().cpu()
            for head, image in enumerate(thumbnails(weights[0], self.layout, scene)):
                self.small[layer, time, head] = image
        if layer in self.figure_layers:
            name = f"attention/{'' if self.kind == 'cross' else 'self/'}layer{layer:02d}/t{time:g}/sample{sample}"
            where = self._where(sample, 0)
            self.images[name] = overlay(weights[0], self.layout, scene, self.kind, layer, time, where)

    def examples(self, lines: Sequence[HeadLine], predictions: Tensor, places: Tensor | None) -> Image.Image:
        """One head of each type, from the chosen patch of the first sample and goal; arguments as of `add_samples`."""
        chosen = [
            Example(line, self.looks[line.row.layer, line.row.time][line.row.head]) for line in one_of_each_type(lines)
        ]
        row, column = self.patch
        place = None if places is None else places[0, 0, row * self.layout.columns + column]
        return examples_figure(self._scene(0), predictions[0, 0], chosen, place)

    def _where(self, sample: int, goal: int) -> str:
        return f"sample {sample}, goal {float(self.batch['time_shift'][sample, goal]):+.2g} s"

    def _scene(self, sample: int) -> Scene:
        target = self.batch["target"][sample, 0].cpu()
        if self.kind == "self":
            return Scene(target[None], torch.ones(1, dtype=torch.bool), target, self.patch, ["itself"])
        return Scene(self.batch["context"][sample].cpu(), self.batch["context_mask"][sample].cpu(), target, self.patch)
