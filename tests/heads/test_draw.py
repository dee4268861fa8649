from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cdit.heads import draw
from cdit.heads.draw import Scene
from cdit.heads.measures import Layout

GRID = (4, 6)


def scene(frames: int = 3, size: tuple[int, int] = (64, 96), missing: bool = False) -> Scene:
    context = torch.full((frames, 3, *size), 90, dtype=torch.uint8)
    mask = torch.arange(frames) >= missing
    return Scene(context, mask, torch.full_like(context[0], 200), (1, 2))


def attention(places: list[tuple[int, int, int, float]], frames: int = 3) -> Tensor:
    """(T, rows, columns) with these weights at (frame, row, column)."""
    maps = torch.zeros(frames, *GRID)
    for frame, row, column, weight in places:
        maps[frame, row, column] = weight
    return maps


def row(layer: int, head: int, name: str) -> SimpleNamespace:
    return SimpleNamespace(layer=layer, head=head, type=SimpleNamespace(name=name, reason=f"{name} 0.9 ≥ 0.8"))


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_frames_are_named_by_their_distance_from_the_newest():
    assert scene(4).names == ["−3", "−2", "−1", "0"]


def test_small_frames_are_magnified_by_whole_numbers_and_large_ones_shrunk():
    assert draw.cell_size(64, 64) == (128, 128)
    assert draw.cell_size(24, 40) == (160, 96)
    assert draw.cell_size(480, 640) == (256, 192)


def test_the_hot_patch_is_the_brightest():
    heat = torch.zeros(2, 3)
    heat[1, 2] = 1
    frame = draw.frame_image(torch.full((3, 20, 30), 100, dtype=torch.uint8), (60, 40))
    pixels = array(draw.heat_overlay(frame, heat)).sum(-1)
    hot = np.zeros((40, 60), bool)
    hot[20:, 40:] = True
    assert pixels[hot].min() > pixels[~hot].max() + 100


@pytest.mark.parametrize(("frames", "size"), [(1, (160, 8)), (2, (64, 64)), (8, (9, 7))])
def test_a_sheet_has_room_for_every_cell_and_heading(monkeypatch, frames, size):
    """Every text and cell lies within the picture, and no two cells overlap."""
    boxes, texts = [], []
    paste, text = Image.Image.paste, draw.ImageDraw.ImageDraw.text

    def note_paste(self: Image.Image, image: Image.Image, place: tuple[int, int]) -> None:
        boxes.append((*place, place[0] + image.width, place[1] + image.height))
        paste(self, image, place)

    def note_text(self, place, words, fill, font, **options):
        texts.append((self._image, self.textbbox(place, words, font, **options)))
        text(self, place, words, fill, font, **options)

    layout = Layout(frames, *GRID)
    weights = torch.full((2, 24, frames * 24 + 1), 1 / (frames * 24 + 1))
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "paste", note_paste)
        patch.setattr(draw.ImageDraw.ImageDraw, "text", note_text)
        figure = draw.layer_figure(scene(frames, size), weights, layout, "a long title " * 8)
    assert len(boxes) == 3 * (1 + 2 * (frames + 1))
    for left, top, right, bottom in (*boxes, *(box for image, box in texts if image is figure)):
        assert left >= 0
        assert top >= 0
        assert right <= figure.width
        assert bottom <= figure.height
    for i, a in enumerate(boxes):
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])


@pytest.fixture
def cells(monkeypatch) -> list[list[Image.Image]]:
    """The cells of the sheet that is drawn."""
    found = []
    sheet = draw.sheet

    def note(title, subtitle, columns, rows, cells, spans, **options):
        found.extend(cells)
        return sheet(title, subtitle, columns, rows, cells, spans, **options)

    monkeypatch.setattr(draw, "sheet", note)
    return found


def test_missing_frames_have_a_placeholder(cells):
    draw.layer_figure(scene(missing=True), torch.full((2, 24, 72), 1 / 72), Layout(3, *GRID), "")
    placeholder = draw.missing_frame(draw.cell_size(64, 96))
    assert [[cell == placeholder for cell in row] for row in cells] == [
        [column in (1, 5) for column in range(9)] for _ in range(3)
    ]


def test_the_extra_key_has_a_bar_of_its_own():
    for extra in (0, 1):
        weights = torch.full((1, 24, 72 + extra), 1 / (72 + extra))
        picture = array(draw.layer_figure(scene(), weights, Layout(3, *GRID), ""))
        assert (picture == draw.EXTRA_BAR).all(-1).any() == bool(extra)


def test_examples_show_attention_and_true_places(cells):
    """Two heads over three grey frames, the oldest missing; the second one attends to two places, one half as much."""
    maps = [attention([(2, 3, 5, 0.8)]), attention([(1, 0, 0, 0.6), (2, 2, 4, 0.3)])]
    places = torch.tensor([[0.5, 0.5], [float("nan")] * 2, [2.5, 1.5]])
    predicted = torch.full((3, 64, 96), 200, dtype=torch.uint8)
    draw.examples_figure(scene(missing=True), predicted, [row(0, 3, "copy"), row(2, 1, "edge")], maps, places)

    def brightness(head: int, frame: int) -> np.ndarray:
        """The middles of the patches."""
        image = array(cells[head][1 + frame]).sum(-1)
        height, width = image.shape
        return image[height // 8 :: height // 4, width // 12 :: width // 6]

    assert np.unravel_index(brightness(0, 2).argmax(), GRID) == (3, 5)
    assert np.unravel_index(brightness(1, 1).argmax(), GRID) == (0, 0)
    assert brightness(1, 1).max() > brightness(1, 2)[2, 4] > 1.2 * np.median(brightness(1, 2))
    for line in cells:
        rings = [(array(cell) == draw.TRUE_PLACE).all(-1) for cell in line]
        assert [bool(ring.any()) for ring in rings] == [False, False, False, True]  # missing, not visible, visible
        y, x = np.argwhere(rings[3]).mean(0) / rings[3].shape
        assert (y, x) == (pytest.approx(2.5 / 4, abs=0.02), pytest.approx(1.5 / 6, abs=0.02))


def test_cells_of_charts_are_coloured_by_their_values():
    panels = {"t = 0.25": np.array([[0.0, 1.0], [np.nan, 0.5]]), "t = 0.75": np.array([[0.0, 0.0], [1.0, 1.0]])}
    pixels = array(draw.measure_heatmap("entropy", panels, [0, 3])).reshape(-1, 3)
    low, high, middle = ((pixels == draw._palette("viridis", share)).all(-1).sum() for share in (0, 1, 0.5))
    assert low == pytest.approx(3 * 62 * 30, rel=0.15)  # but for the digits
    assert high == pytest.approx(3 * 62 * 30, rel=0.15)
    assert middle == pytest.approx(62 * 30, rel=0.15)
    assert (pixels == draw.NO_VALUE).all(-1).sum() == pytest.approx(62 * 30, rel=0.15)
