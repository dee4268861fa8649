import pytest
import torch

from cdit.heads.edges import edge_lift, edge_patches, edge_share, gradient_magnitude
from cdit.heads.measures import Layout

LAYOUT = Layout(frames=2, rows=2, columns=4)


def test_a_ramp_has_its_slope_within_and_half_of_it_at_the_repeated_border():
    columns = torch.arange(16.0) * 0.05
    frame = columns.expand(3, 8, 16)
    magnitude = gradient_magnitude(frame, LAYOUT).reshape(2, 4)
    # Central differences: (0.05 + 0.05) / 2 within; at the border one of the two is 0.
    within, at_border = 0.05, (3 * 0.05 + 0.025) / 4
    expected = torch.tensor([at_border, within, within, at_border]).expand(2, 4)
    torch.testing.assert_close(magnitude, expected)


def test_the_gradient_is_of_luma_and_as_long_whichever_way_it_points():
    ramp = torch.arange(16.0) * 0.03
    slanted = 0.6 * ramp[:, None] + 0.8 * ramp[None]  # length 0.03
    frames = torch.zeros(3, 3, 16, 16)
    for channel in range(3):
        frames[channel, channel] = slanted
    inner = gradient_magnitude(frames, Layout(1, 4, 4)).reshape(3, 4, 4)[:, 1:3, 1:3]
    expected = torch.tensor([0.299, 0.587, 0.114])[:, None, None].expand(3, 2, 2) * 0.03
    torch.testing.assert_close(inner, expected)


def test_sobel_of_a_single_bright_pixel():
    frame = torch.zeros(3, 9, 9)
    frame[:, 4, 4] = 1
    magnitude = gradient_magnitude(frame, Layout(1, 9, 9)).reshape(9, 9)
    beside, diagonal = 2 / 8, 2**0.5 / 8
    expected = torch.tensor([[diagonal, beside, diagonal], [beside, 0, beside], [diagonal, beside, diagonal]])
    torch.testing.assert_close(magnitude[3:6, 3:6], expected)
    assert magnitude.count_nonzero() == 8


def test_edge_patches_are_the_upper_quarter():
    magnitude = torch.tensor([3.0, 1, 8, 2, 5, 4, 7, 6])
    assert edge_patches(magnitude).tolist() == [0, 0, 1, 0, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("magnitude", "expected"),
    [
        ([0.0] * 8, [0.25] * 8),  # nothing stands out
        ([9.0, 5, 5, 5, 5, 1, 1, 1], [1, 0.25, 0.25, 0.25, 0.25, 0, 0, 0]),  # four share the second place
        ([3.0, 1, 2, 0, 0, 0], [1, 0, 0.5, 0, 0, 0]),  # a quarter of six is one and a half
        ([2.0, 1], [0.5, 0]),
    ],
)
def test_ties_share_what_is_left(magnitude, expected):
    torch.testing.assert_close(edge_patches(torch.tensor([magnitude, magnitude])), torch.tensor([expected, expected]))


def test_lift_is_one_by_chance_four_at_edges_only_and_between_for_a_mixture():
    edges = edge_patches(torch.rand(2, 8, generator=torch.Generator().manual_seed(0)))
    uniform = torch.full((5, 3, 8, 17), 1 / 17)  # the extra key counts for nothing
    torch.testing.assert_close(edge_lift(uniform, edges, LAYOUT), torch.ones(5, 3, 8))
    only = (edges / edges.sum()).flatten().expand(8, 16)
    torch.testing.assert_close(edge_lift(only, edges, LAYOUT), torch.full((8,), 4.0))
    never = ((1 - edges) / (1 - edges).sum()).flatten().expand(8, 16)
    torch.testing.assert_close(edge_share(never, edges, LAYOUT), torch.zeros(8))
    mixture = 0.3 * only + 0.7 / 16
    torch.testing.assert_close(edge_lift(mixture, edges, LAYOUT), torch.full((8,), 0.3 * 4 + 0.7))
    assert edge_lift(torch.zeros(8, 16), edges, LAYOUT).isnan().all()


def test_edges_of_each_frame_and_sample_are_told_apart():
    edges = torch.zeros(2, 1, 2, 8)
    edges[0, 0, 1, 3] = edges[1, 0, 0, 5] = 2
    weights = torch.zeros(2, 1, 8, 16)
    weights[:, :, :, 8 + 3] = 1
    share = edge_share(weights, edges, LAYOUT)
    assert share[0].eq(2).all()
    assert share[1].eq(0).all()


def test_a_place_where_edges_always_are_is_no_evidence():
    edges = torch.zeros(10, 1, 8)
    edges[:, 0, 0] = 1
    edges[:5, 0, 1], edges[5:, 0, 2] = 1, 1
    layout, chance = Layout(1, 2, 4), edges.mean(0)
    for column, expected in ((0, 1.0), (1, 2.0)):
        weights = torch.zeros(8, 8)
        weights[:, column] = 1
        torch.testing.assert_close(edge_lift(weights, edges[0], layout, chance), torch.full((8,), expected))
