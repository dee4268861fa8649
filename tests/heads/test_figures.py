import numpy as np
import pytest
import torch

from cdit.heads import figures
from cdit.heads.figures import HeadMaps, Scene, attention_figure, frame_name


def scene(frames: int, size: tuple[int, int]) -> Scene:
    context = torch.full((frames, 3, *size), 128, dtype=torch.uint8)
    return Scene(context, torch.ones(frames, dtype=torch.bool), context[0], patch=(1, 2))


def maps(heads: int, frames: int, grid: tuple[int, int], extra: bool = False) -> HeadMaps:
    count = frames * grid[0] * grid[1] + extra
    return HeadMaps(torch.full((heads, frames, *grid), 1 / count), torch.full((heads,), 1 / count) if extra else None)


def test_frames_are_named_by_their_distance_from_the_current_one():
    assert [frame_name(i, 4) for i in range(4)] == ["−3", "−2", "−1", "0"]


@pytest.mark.parametrize(
    ("frames", "size", "grid"), [(2, (64, 64), (8, 8)), (4, (32, 224), (2, 14)), (8, (9, 7), (3, 7))]
)
def test_figures_grow_with_frames_and_heads(frames, size, grid):
    sizes = [
        attention_figure(scene(count, size), maps(heads, count, grid), maps(heads, count, grid), "title").size
        for heads, count in ((2, frames), (3, frames), (2, frames + 1))
    ]
    cell = figures.cell_size(*size)
    assert sizes[1][1] - sizes[0][1] >= cell[1]
    assert sizes[2][0] - sizes[0][0] == 2 * (cell[0] + figures.GAP)


def test_small_frames_are_magnified_by_whole_numbers_and_large_ones_shrunk():
    assert figures.cell_size(64, 64) == (128, 128)
    assert figures.cell_size(24, 40) == (160, 96)
    assert figures.cell_size(480, 640) == (256, 192)


def test_the_hot_patch_glows_where_it_is():
    heat = torch.zeros(2, 3)
    heat[1, 2] = 1
    frame = figures.frame_image(torch.full((3, 20, 30), 100, dtype=torch.uint8), (60, 40))
    pixels = np.asarray(figures.heat_overlay(frame, heat)).sum(-1)
    hot = np.zeros((40, 60), bool)
    hot[20:, 40:] = True
    assert pixels[hot].min() > pixels[~hot].max() + 100


def test_missing_frames_are_shown_as_such():
    view = scene(2, (64, 64))
    whole = np.asarray(attention_figure(view, maps(2, 2, (8, 8)), maps(2, 2, (8, 8)), ""))
    view.context_mask[0] = False
    missing = np.asarray(attention_figure(view, maps(2, 2, (8, 8)), maps(2, 2, (8, 8)), ""))
    hatch = np.asarray(figures.missing_frame((128, 128)))

    def count(picture: np.ndarray) -> int:
        left = figures.LABEL_WIDTH + 128 + 4 * figures.GAP
        return sum((picture[y : y + 128, left : left + 128] == hatch).all() for y in range(picture.shape[0] - 127))

    assert (count(whole), count(missing)) == (0, 3)  # the plain frame and two heads


def test_the_extra_key_has_a_bar_of_its_own():
    bar = np.array(figures.EXTRA_BAR)
    for extra in (False, True):
        picture = np.asarray(
            attention_figure(scene(1, (16, 16)), maps(1, 1, (1, 4), extra), maps(1, 1, (1, 4), extra), "")
        )
        assert (picture == bar).all(-1).any() == extra


def test_headings_and_titles_fit_beside_few_narrow_frames():
    few = attention_figure(scene(1, (160, 8)), maps(1, 1, (20, 1)), maps(1, 1, (20, 1)), "a long title " * 8)
    assert few.width > 800
    assert (np.asarray(few)[:, -figures.GAP :] == 255).all()
