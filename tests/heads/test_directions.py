import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cdit.heads.directions import OffsetFields, fit_motion, offset_fields, trends
from cdit.heads.measures import Layout

LAYOUT = Layout(frames=2, rows=6, columns=8)
N = 48


def looking_at(places: Tensor, layout: Layout, frame: int) -> Tensor:
    """Attention (N, M) whose expected place in a frame is `places` (N, 2): bilinear, nothing outside of the grid."""
    weights = torch.zeros(layout.patches, layout.frames, layout.rows, layout.columns)
    for query, (row, column) in enumerate(places.tolist()):
        if 0 <= row <= layout.rows - 1 and 0 <= column <= layout.columns - 1:
            top, left = min(int(row), layout.rows - 2), min(int(column), layout.columns - 2)
            down, right = row - top, column - left
            weights[query, frame, top : top + 2, left : left + 2] = torch.tensor(
                [[(1 - down) * (1 - right), (1 - down) * right], [down * (1 - right), down * right]]
            )
    return weights.flatten(1)


def from_centre(layout: Layout) -> Tensor:
    return layout.positions() - torch.tensor([(layout.rows - 1) / 2, (layout.columns - 1) / 2])


@pytest.mark.parametrize(("row", "column"), [(0.0, 0.0), (1.0, 0.0), (0.0, -2.5), (-0.75, 1.5)])
def test_a_shift_is_a_translation_without_divergence(row, column):
    weights = looking_at(LAYOUT.positions() + torch.tensor([row, column]), LAYOUT, 1)
    fields = offset_fields(weights, LAYOUT)
    seeing = weights.sum(-1) > 0
    torch.testing.assert_close(fields.offset[1][seeing], torch.tensor([row, column]).expand(int(seeing.sum()), 2))
    motion = fit_motion(fields, LAYOUT)
    torch.testing.assert_close(motion.translation[1], torch.tensor([row, column]), atol=1e-5, rtol=0)
    assert motion.divergence[1].item() == pytest.approx(0, abs=1e-5)
    assert motion.translation[0].isnan().all()  # nobody looks at that frame
    assert motion.divergence[0].isnan()


@pytest.mark.parametrize("divergence", [-0.3, -0.1, 0.2])
def test_an_expansion_is_a_divergence_without_translation(divergence):
    places = LAYOUT.positions() + divergence * from_centre(LAYOUT)
    motion = fit_motion(offset_fields(looking_at(places, LAYOUT, 0), LAYOUT), LAYOUT)
    torch.testing.assert_close(motion.translation[0], torch.zeros(2), atol=1e-5, rtol=0)
    assert motion.divergence[0].item() == pytest.approx(divergence, abs=1e-5)


def test_both_at_once_are_told_apart_though_part_of_the_frame_sees_nothing():
    places = LAYOUT.positions() - 0.2 * from_centre(LAYOUT) + torch.tensor([0.5, -2.0])
    weights = looking_at(places, LAYOUT, 0)
    assert 0 < (weights.sum(-1) == 0).sum() < N // 2
    motion = fit_motion(offset_fields(weights, LAYOUT), LAYOUT)
    torch.testing.assert_close(motion.translation[0], torch.tensor([0.5, -2.0]), atol=1e-5, rtol=0)
    assert motion.divergence[0].item() == pytest.approx(-0.2, abs=1e-5)


def test_spreading_evenly_converges_on_the_centre():
    weights = torch.full((3, N, 2 * N + 1), 1 / (2 * N + 1))
    fields = offset_fields(weights, LAYOUT)
    torch.testing.assert_close(fields.mass, torch.full((3, 2, N), N / (2 * N + 1)))
    torch.testing.assert_close(fields.offset, -from_centre(LAYOUT).expand(3, 2, N, 2), atol=1e-5, rtol=0)
    motion = fit_motion(fields, LAYOUT)
    torch.testing.assert_close(motion.translation, torch.zeros(3, 2, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(motion.divergence, torch.full((3, 2), -1.0))


def test_a_mixture_moves_by_its_share():
    """Half on the shifted place, half spread evenly: half of each one's field."""
    still = torch.full((N, 2 * N), 0.0)
    still[:, :N] = 1 / N
    shifted = looking_at(LAYOUT.positions() + torch.tensor([0.0, 1.0]), LAYOUT, 0)
    inside = shifted.sum(-1) > 0
    weights = torch.where(inside[:, None], (still + shifted) / 2, 0.0)
    motion = fit_motion(offset_fields(weights, LAYOUT), LAYOUT)
    torch.testing.assert_close(motion.translation[0], torch.tensor([0.0, 0.5]), atol=1e-5, rtol=0)
    assert motion.divergence[0].item() == pytest.approx(-0.5, abs=1e-5)


def test_patches_weigh_by_their_mass():
    """Weighted least squares, against numpy's on rows scaled by the root of their weight."""
    draws = torch.Generator().manual_seed(0)
    offset, mass = torch.randn(1, N, 2, generator=draws), torch.rand(1, N, generator=draws)
    position = from_centre(LAYOUT)
    design = torch.zeros(N, 2, 3)
    design[:, 0, 0] = design[:, 1, 1] = 1
    design[:, :, 2] = position
    root = mass[0].sqrt().repeat_interleave(2)
    solution = np.linalg.lstsq(
        (design.flatten(0, 1) * root[:, None]).double(), (offset[0].flatten() * root).double(), rcond=None
    )[0]
    motion = fit_motion(OffsetFields(offset, mass), LAYOUT)
    found = torch.cat((motion.translation[0], motion.divergence))
    torch.testing.assert_close(found.double(), torch.as_tensor(solution), atol=1e-5, rtol=1e-4)


def pinhole(layout: Layout, focal: float, dx: float, dyaw: float, depth: float) -> Tensor:
    """Where in the past frame each patch's content stood, by projecting a wall at `depth` metres before the step.

    The camera moves dx along its axis, then turns left by dyaw.
    """
    rows, columns = from_centre(layout).double().unbind(-1)
    right, down, ahead = columns / focal, rows / focal, torch.ones(layout.patches, dtype=torch.float64)
    cos, sin = math.cos(dyaw), math.sin(dyaw)
    right, ahead = cos * right - sin * ahead, sin * right + cos * ahead  # into the axes of before the turn
    scale = (depth - dx) / ahead  # where the ray meets the wall
    centre = (layout.positions().double() - from_centre(layout).double())[0]
    seen = torch.stack((down * scale / depth * focal, right * scale / depth * focal), dim=-1)
    return (seen + centre).float()


def test_a_head_that_follows_the_picture_has_the_slopes_of_the_pinhole_camera():
    draws, focal, depth = np.random.default_rng(0), 6.0, 4.0
    layout = Layout(1, 12, 16)
    actions = np.stack([draws.uniform(0, 0.4, 40), np.zeros(40), draws.uniform(-0.12, 0.12, 40)], axis=1)
    translation, divergence = [], []
    for dx, _, dyaw in actions:
        weights = looking_at(pinhole(layout, focal, dx, dyaw, depth), layout, 0)
        motion = fit_motion(offset_fields(weights, layout), layout)
        translation.append(motion.translation[0, 1].item())
        divergence.append(motion.divergence[0].item())
    turning = trends(np.array(translation), actions, list(range(40)))[2]
    walking = trends(np.array(divergence), actions, list(range(40)))[0]
    # f·tan(dyaw) holds at the centre; away from it the shift is larger by 1 + (column / f)², so wide fields turn more.
    assert -1.6 * focal < turning.slope.mean < -0.95 * focal
    assert turning.correlation < -0.95
    assert walking.slope.mean == pytest.approx(-1 / depth, rel=0.1)
    assert walking.correlation < -0.95


def test_slopes_are_those_of_ordinary_least_squares():
    draws = np.random.default_rng(1)
    factors = draws.normal(size=(60, 3))
    factors[:, 2] += 0.8 * factors[:, 0]
    values = 2 * factors[:, 0] - 3 * factors[:, 2] + 5 + draws.normal(size=60)
    design = np.column_stack((np.ones(60), factors))
    expected = np.linalg.lstsq(design, values, rcond=None)[0][1:]
    found = trends(values, factors, list(range(60)))
    np.testing.assert_allclose([trend.slope.mean for trend in found], expected, rtol=1e-10)
    # The partial correlation from the inverse of the correlation matrix.
    precision = np.linalg.inv(np.corrcoef(np.column_stack((values, factors)).T))
    partial = [-precision[0, i] / math.sqrt(precision[0, 0] * precision[i, i]) for i in (1, 2, 3)]
    np.testing.assert_allclose([trend.correlation for trend in found], partial, rtol=1e-8)


def test_intervals_are_as_wide_as_the_standard_error_says():
    draws = np.random.default_rng(2)
    factor = draws.normal(size=(400, 1))
    noise = draws.normal(size=400)
    (trend,) = trends(1.5 * factor[:, 0] + noise, factor, list(range(400)))
    error = 1.96 / math.sqrt(400)
    assert trend.slope.high - trend.slope.low == pytest.approx(2 * error, rel=0.2)
    assert trend.slope.low < 1.5 < trend.slope.high


def test_what_does_not_vary_has_no_trend():
    factors = np.column_stack((np.arange(6.0), np.full(6, 0.1), 2 * np.arange(6.0)))
    found = trends(np.arange(6.0), factors, "aabbcc")
    assert [(trend.slope.mean, trend.correlation) for trend in found] == [(0, 0)] * 3  # the third repeats the first
    (flat,) = trends(np.full(6, 0.3), factors[:, :1], "aabbcc")
    assert flat.slope.mean == pytest.approx(0)
    assert flat.correlation == 0


def test_samples_without_a_number_are_left_out():
    values, factors = np.array([0.0, 2, 4, np.nan, 8]), np.arange(5.0)[:, None]
    assert trends(values, factors, "abcde")[0].slope.mean == pytest.approx(2)
    assert trends(np.full(5, np.nan), factors, "abcde")[0].correlation == 0
