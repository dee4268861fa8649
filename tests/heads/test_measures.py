import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cdit.heads import measures
from cdit.heads.choose import trends
from cdit.heads.measures import (
    Layout,
    OffsetFields,
    edge_lift,
    edge_patches,
    fit_motion,
    gradient_magnitude,
    head_distances,
    offset_fields,
    value_norms,
    value_weighted,
)

LAYOUT = Layout(frames=3, rows=4, columns=6)
N, M = 24, 72


def shifted(layout: Layout, frame: int, rows: int, columns: int) -> Tensor:
    """Each patch attends to the one (rows, columns) further in a frame; those at the border to nothing."""
    weights = torch.zeros(layout.patches, layout.frames, layout.rows, layout.columns)
    for query, (row, column) in enumerate(layout.positions().tolist()):
        if 0 <= row + rows < layout.rows and 0 <= column + columns < layout.columns:
            weights[query, frame, row + rows, column + columns] = 1
    return weights.flatten(1)


def test_uniform_weights_have_the_largest_entropy_and_even_masses():
    weights = torch.full((2, 5, N, M + 1), 1 / (M + 1))
    torch.testing.assert_close(measures.entropy(weights), torch.full((2, 5, N), math.log(M + 1)))
    torch.testing.assert_close(measures.frame_mass(weights, LAYOUT), torch.full((2, 5, N, 3), N / (M + 1)))
    torch.testing.assert_close(measures.extra_share(weights, LAYOUT), torch.full((2, 5, N), 1 / (M + 1)))


def test_uniform_weights_are_as_far_as_patches_are_on_average():
    positions = [(row, column) for row in range(4) for column in range(6)]
    expected = torch.tensor([sum(math.dist(a, b) for b in positions) / N for a in positions])
    weights = torch.full((N, M), 1 / M)
    torch.testing.assert_close(measures.mean_distance(weights, LAYOUT), expected)


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (1, 0), (0, -2), (-3, 4)])
def test_shifted_weights_are_at_the_distance_and_offset_of_the_shift(rows, columns):
    weights = shifted(LAYOUT, 0, rows, columns)
    seeing = weights.sum(-1) > 0
    distance = measures.mean_distance(weights, LAYOUT)
    torch.testing.assert_close(distance[seeing], torch.full_like(distance[seeing], math.hypot(rows, columns)))
    assert distance[~seeing].isnan().all()
    mass = measures.offset_mass(weights, LAYOUT)
    assert measures.largest_offset(mass[None, None], LAYOUT).tolist() == [[[rows, columns]]]
    torch.testing.assert_close(mass[3 + rows, 5 + columns], seeing.float().mean())
    assert mass.count_nonzero() == 1


def test_the_score_range_is_that_of_what_can_be_seen():
    scores = torch.tensor([[1.0, 4.0, -2.0], [3.0, -torch.inf, 2.5], [-torch.inf] * 3, [0.0, 200.0, 0.0]])
    torch.testing.assert_close(measures.score_range(scores), torch.tensor([6.0, 0.5, math.nan, 200.0]), equal_nan=True)


def test_same_place_share():
    torch.testing.assert_close(measures.same_place_share(shifted(LAYOUT, 1, 0, 0), LAYOUT), torch.ones(N))
    aside = measures.same_place_share(shifted(LAYOUT, 1, 0, 1), LAYOUT)
    at_border = torch.arange(N) % 6 == 5
    assert aside[~at_border].eq(0).all()
    assert aside[at_border].isnan().all()
    uniform = torch.full((2, N, M + 1), 1 / (M + 1))  # the extra key does not count
    torch.testing.assert_close(measures.same_place_share(uniform, LAYOUT), torch.full((2, N), 1 / N))
    mixture = 0.6 * shifted(LAYOUT, 2, 0, 0) + 0.4 / M
    torch.testing.assert_close(measures.same_place_share(mixture, LAYOUT), torch.full((N,), 0.6 + 0.4 / N))


EDGE_LAYOUT = Layout(frames=2, rows=2, columns=4)


def test_a_ramp_has_its_slope_within_and_half_of_it_at_the_repeated_border():
    columns = torch.arange(16.0) * 0.05
    frame = columns.expand(3, 8, 16)
    magnitude = gradient_magnitude(frame, EDGE_LAYOUT).reshape(2, 4)
    # Central differences: (0.05 + 0.05) / 2 within; at the border one of the two is 0.
    within, at_border = 0.05, (3 * 0.05 + 0.025) / 4
    expected = torch.tensor([at_border, within, within, at_border]).expand(2, 4)
    torch.testing.assert_close(magnitude, expected)


def test_the_gradient_is_of_luma_and_as_long_in_any_direction():
    ramp = torch.arange(16.0) * 0.03
    slanted = 0.6 * ramp[:, None] + 0.8 * ramp[None]  # length 0.03
    frames = torch.zeros(3, 3, 16, 16)
    for channel in range(3):
        frames[channel, channel] = slanted
    inner = gradient_magnitude(frames, Layout(1, 4, 4)).reshape(3, 4, 4)[:, 1:3, 1:3]
    expected = torch.tensor([0.299, 0.587, 0.114])[:, None, None].expand(3, 2, 2) * 0.03
    torch.testing.assert_close(inner, expected)


@pytest.mark.parametrize(
    ("magnitude", "expected"),
    [
        ([3.0, 1, 8, 2, 5, 4, 7, 6], [0.0, 0, 1, 0, 0, 0, 1, 0]),  # the upper quarter
        ([0.0] * 8, [0.25] * 8),  # nothing stands out
        ([9.0, 5, 5, 5, 5, 1, 1, 1], [1, 0.25, 0.25, 0.25, 0.25, 0, 0, 0]),  # four share the second place
        ([3.0, 1, 2, 0, 0, 0], [1, 0, 0.5, 0, 0, 0]),  # a quarter of six is one and a half
        ([2.0, 1], [0.5, 0]),
    ],
)
def test_edge_patches_are_the_upper_quarter_and_ties_share_what_is_left(magnitude, expected):
    torch.testing.assert_close(edge_patches(torch.tensor([magnitude, magnitude])), torch.tensor([expected, expected]))


def test_lift_is_one_by_chance_four_at_edges_only_and_between_for_a_mixture():
    edges = edge_patches(torch.rand(2, 8, generator=torch.Generator().manual_seed(0)))
    uniform = torch.full((5, 3, 8, 17), 1 / 17)  # the extra key counts for nothing
    even = torch.full_like(edges, 0.25)

    def lift(weights: Tensor) -> Tensor:
        return edge_lift(weights, edges, EDGE_LAYOUT, even)

    torch.testing.assert_close(lift(uniform), torch.ones(5, 3, 8))
    only = (edges / edges.sum()).flatten().expand(8, 16)
    torch.testing.assert_close(lift(only), torch.full((8,), 4.0))
    never = ((1 - edges) / (1 - edges).sum()).flatten().expand(8, 16)
    torch.testing.assert_close(lift(never), torch.zeros(8))
    mixture = 0.3 * only + 0.7 / 16
    torch.testing.assert_close(lift(mixture), torch.full((8,), 0.3 * 4 + 0.7))
    assert lift(torch.zeros(8, 16)).isnan().all()


def test_edges_of_each_frame_and_sample_are_separate():
    edges = torch.zeros(2, 1, 2, 8)
    edges[0, 0, 1, 3] = edges[1, 0, 0, 5] = 2
    weights = torch.zeros(2, 1, 8, 16)
    weights[:, :, :, 8 + 3] = 1
    lift = edge_lift(weights, edges, EDGE_LAYOUT, edges.mean((0, 1)))
    assert lift[0].eq(2).all()
    assert lift[1].eq(0).all()


def test_a_place_where_edges_always_are_is_no_evidence():
    edges = torch.zeros(10, 1, 8)
    edges[:, 0, 0] = 1
    edges[:5, 0, 1], edges[5:, 0, 2] = 1, 1
    layout, chance = Layout(1, 2, 4), edges.mean(0)
    for column, expected in ((0, 1.0), (1, 2.0)):
        weights = torch.zeros(8, 8)
        weights[:, column] = 1
        torch.testing.assert_close(edge_lift(weights, edges[0], layout, chance), torch.full((8,), expected))


def test_norms_are_those_of_what_each_head_alone_would_add():
    draws = torch.Generator().manual_seed(0)
    values = torch.randn(2, 3, 5, 4, generator=draws)  # 3 heads of width 4
    whole = torch.randn(12, 12, generator=draws)  # W_O
    maps = whole.unflatten(1, (3, 4)).transpose(0, 1)
    norms = value_norms(values, maps)
    for sample, head, token in [(0, 0, 0), (1, 2, 4), (1, 1, 3)]:
        alone = torch.zeros(12)
        alone[4 * head : 4 * head + 4] = values[sample, head, token]
        torch.testing.assert_close(norms[sample, head, token], torch.linalg.vector_norm(whole @ alone))


def test_what_is_moved_is_shared_out_by_weight_times_norm():
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]])
    norms = torch.tensor([1.0, 6.0, 0.0])  # the last token is a sink that gives nothing
    expected = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(value_weighted(weights, norms), expected)


def test_equal_heads_are_at_zero_and_disjoint_ones_at_one():
    weights = torch.zeros(4, 5, 6)
    weights[0, :, 0] = weights[1, :, 0] = 1
    weights[2, :, 1:3] = 0.5
    weights[3, :, 5] = 1
    expected = torch.ones(4, 4) - torch.eye(4)
    expected[0, 1] = expected[1, 0] = 0
    assert torch.equal(head_distances(weights), expected)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.9])
def test_a_mixture_is_as_far_as_its_closed_form(share):
    """p = (1, 0) against q = (1 - a, a): JSD = h(a / 2) - h(a) / 2 with the binary entropy h in bits."""

    def h(a: float) -> float:
        return -a * math.log2(a) - (1 - a) * math.log2(1 - a)

    weights = torch.tensor([[[1.0, 0.0]], [[1 - share, share]]])
    expected = math.sqrt(h(share / 2) - h(share) / 2)
    assert head_distances(weights)[0, 1].item() == pytest.approx(expected, rel=1e-5)


def test_distances_are_averaged_over_patches_and_leading_dimensions_stay():
    weights = torch.zeros(2, 3, 4, 5)
    weights[..., 0] = 1
    weights[1, 1, :3] = torch.tensor([0.0, 1, 0, 0, 0])  # three of four patches of one head look elsewhere
    distances = head_distances(weights)
    assert distances[0].eq(0).all()
    expected = torch.tensor([[0, 0.75, 0], [0.75, 0, 0.75], [0, 0.75, 0]])
    torch.testing.assert_close(distances[1], expected)


def test_it_is_a_metric_on_random_heads():
    weights = torch.randn(6, 1, 30, generator=torch.Generator().manual_seed(2)).mul(3).softmax(-1)
    distance = head_distances(weights)
    assert torch.equal(distance, distance.T)
    assert (distance[:, None] <= distance[:, :, None] + distance[None] + 1e-6).all()


MOTION_LAYOUT, MOTION_N = Layout(frames=2, rows=6, columns=8), 48


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
    weights = looking_at(MOTION_LAYOUT.positions() + torch.tensor([row, column]), MOTION_LAYOUT, 1)
    fields = offset_fields(weights, MOTION_LAYOUT)
    seeing = weights.sum(-1) > 0
    torch.testing.assert_close(fields.offset[1][seeing], torch.tensor([row, column]).expand(int(seeing.sum()), 2))
    motion = fit_motion(fields, MOTION_LAYOUT)
    torch.testing.assert_close(motion.translation[1], torch.tensor([row, column]), atol=1e-5, rtol=0)
    assert motion.divergence[1].item() == pytest.approx(0, abs=1e-5)
    assert motion.translation[0].isnan().all()  # no weight on that frame
    assert motion.divergence[0].isnan()


def test_both_at_once_are_separated_though_part_of_the_frame_sees_nothing():
    places = MOTION_LAYOUT.positions() - 0.2 * from_centre(MOTION_LAYOUT) + torch.tensor([0.5, -2.0])
    weights = looking_at(places, MOTION_LAYOUT, 0)
    assert 0 < (weights.sum(-1) == 0).sum() < MOTION_N // 2
    motion = fit_motion(offset_fields(weights, MOTION_LAYOUT), MOTION_LAYOUT)
    torch.testing.assert_close(motion.translation[0], torch.tensor([0.5, -2.0]), atol=1e-5, rtol=0)
    assert motion.divergence[0].item() == pytest.approx(-0.2, abs=1e-5)


def test_spreading_evenly_converges_on_the_centre():
    weights = torch.full((3, MOTION_N, 2 * MOTION_N + 1), 1 / (2 * MOTION_N + 1))
    fields = offset_fields(weights, MOTION_LAYOUT)
    torch.testing.assert_close(fields.mass, torch.full((3, 2, MOTION_N), MOTION_N / (2 * MOTION_N + 1)))
    torch.testing.assert_close(fields.offset, -from_centre(MOTION_LAYOUT).expand(3, 2, MOTION_N, 2), atol=1e-5, rtol=0)
    motion = fit_motion(fields, MOTION_LAYOUT)
    torch.testing.assert_close(motion.translation, torch.zeros(3, 2, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(motion.divergence, torch.full((3, 2), -1.0))


def test_patches_weigh_by_their_mass():
    """Weighted least squares, against numpy's on rows scaled by the root of their weight."""
    draws = torch.Generator().manual_seed(0)
    offset, mass = torch.randn(1, MOTION_N, 2, generator=draws), torch.rand(1, MOTION_N, generator=draws)
    position = from_centre(MOTION_LAYOUT)
    design = torch.zeros(MOTION_N, 2, 3)
    design[:, 0, 0] = design[:, 1, 1] = 1
    design[:, :, 2] = position
    root = mass[0].sqrt().repeat_interleave(2)
    solution = np.linalg.lstsq(
        (design.flatten(0, 1) * root[:, None]).double(), (offset[0].flatten() * root).double(), rcond=None
    )[0]
    motion = fit_motion(OffsetFields(offset, mass), MOTION_LAYOUT)
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
