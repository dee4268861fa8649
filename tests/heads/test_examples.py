"""The figure of one head of each type, read back from its pixels."""

from types import SimpleNamespace

import numpy as np
import torch

from cdit.heads.examples import COUNT, LABEL_WIDTH, TOP, TRUE_PLACE, Example, examples_figure, one_of_each_type
from cdit.heads.figures import GAP, Scene, cell_size


def line(layer: int, head: int, name: str, time: float = 0.25) -> SimpleNamespace:
    kind = SimpleNamespace(name=name, reason=f"{name} 0.9 ≥ 0.8")
    return SimpleNamespace(row=SimpleNamespace(layer=layer, head=head, time=time, type=kind))


def test_the_first_head_of_each_type_and_the_mixed_last():
    lines = [line(0, 0, "mixed"), line(0, 1, "copy"), line(1, 0, "copy"), line(1, 1, "edge"), line(0, 0, "sink", 0.75)]
    assert [(one.row.layer, one.row.head) for one in one_of_each_type(lines)] == [(0, 1), (1, 1), (0, 0)]
    many = [line(0, i, f"type {i}") for i in range(COUNT + 3)]
    assert one_of_each_type(many) == many[:COUNT]


def test_where_the_colours_and_rings_are():
    """Two heads over three grey frames of 4 × 6 patches; the second one looks at two places, one half as much."""
    frames, grid, side = 3, (4, 6), 64
    past = torch.full((frames, 3, side, side * 3 // 2), 90, dtype=torch.uint8)
    scene = Scene(past, torch.tensor([False, True, True]), torch.zeros_like(past[0]), (1, 2))
    maps = torch.zeros(2, frames, *grid)
    maps[0, 2, 3, 5] = 0.8
    maps[1, 1, 0, 0], maps[1, 2, 2, 4] = 0.6, 0.3
    places = torch.tensor([[0.5, 0.5], [float("nan")] * 2, [2.5, 1.5]])
    predicted = torch.full((3, side, side * 3 // 2), 200, dtype=torch.uint8)
    examples = [Example(line(0, 3, "copy"), maps[0]), Example(line(2, 1, "edge"), maps[1])]
    image = np.asarray(examples_figure(scene, predicted, examples, places)).astype(int)
    width, height = cell_size(side, side * 3 // 2)

    def patch(row: int, frame: int, r: int, c: int) -> np.ndarray:
        """The middle of a patch: mean colour."""
        x = LABEL_WIDTH + width + 4 * GAP + frame * (width + GAP) + (c + 0.5) * width / grid[1]
        y = TOP + row * (height + GAP) + (r + 0.5) * height / grid[0]
        return image[int(y) - 2 : int(y) + 3, int(x) - 2 : int(x) + 3].mean((0, 1))

    def brightness(row: int, frame: int) -> np.ndarray:
        return np.array([[patch(row, frame, r, c).sum() for c in range(grid[1])] for r in range(grid[0])])

    assert np.unravel_index(brightness(0, 2).argmax(), grid) == (3, 5)
    assert np.unravel_index(brightness(1, 1).argmax(), grid) == (0, 0)
    assert brightness(1, 1).max() > brightness(1, 2)[2, 4] > 1.2 * np.median(brightness(1, 2))
    left = LABEL_WIDTH + width + 4 * GAP
    rings = (image == TRUE_PLACE).all(-1)
    for row in range(2):
        rows = slice(TOP + row * (height + GAP), TOP + row * (height + GAP) + height)
        counts = [rings[rows, left + i * (width + GAP) : left + i * (width + GAP) + width] for i in range(frames)]
        assert [bool(count.any()) for count in counts] == [False, False, True]  # missing, not in sight, in sight
        y, x = np.argwhere(counts[2]).mean(0)
        assert abs(y - 2.5 / 4 * height) < 1.5
        assert abs(x - 1.5 / 6 * width) < 1.5
