import math

import pytest
import torch
from torch import Tensor

from cdit.heads import measures
from cdit.heads.measures import Layout

LAYOUT = Layout(frames=3, rows=4, columns=6)
N, M = 24, 72


def shifted(layout: Layout, frame: int, rows: int, columns: int) -> Tensor:
    """Each patch looks at the one (rows, columns) further in a frame; those at the border see nothing."""
    weights = torch.zeros(layout.patches, layout.frames, layout.rows, layout.columns)
    for query, (row, column) in enumerate(layout.positions().tolist()):
        if 0 <= row + rows < layout.rows and 0 <= column + columns < layout.columns:
            weights[query, frame, row + rows, column + columns] = 1
    return weights.flatten(1)


def test_uniform_weights_have_the_largest_entropy_and_even_masses():
    weights = torch.full((2, 5, N, M + 1), 1 / (M + 1))
    torch.testing.assert_close(measures.entropy(weights), torch.full((2, 5, N), math.log(M + 1)))
    torch.testing.assert_close(measures.effective_tokens(weights), torch.full((2, 5, N), M + 1.0))
    torch.testing.assert_close(measures.frame_mass(weights, LAYOUT), torch.full((2, 5, N, 3), N / (M + 1)))
    torch.testing.assert_close(measures.extra_share(weights, LAYOUT), torch.full((2, 5, N), 1 / (M + 1)))


def test_uniform_weights_are_as_far_as_patches_are_on_average():
    positions = [(row, column) for row in range(4) for column in range(6)]
    expected = torch.tensor([sum(math.dist(a, b) for b in positions) / N for a in positions])
    weights = torch.full((N, M), 1 / M)
    torch.testing.assert_close(measures.mean_distance(weights, LAYOUT), expected)


def test_one_hot_weights_have_no_entropy():
    weights = torch.zeros(N, M)
    weights[:, N + 7] = 1
    assert measures.entropy(weights).eq(0).all()
    assert measures.effective_tokens(weights).eq(1).all()
    assert measures.frame_mass(weights, LAYOUT).tolist() == [[0, 1, 0]] * N
    assert measures.extra_share(weights, LAYOUT).eq(0).all()
    assert measures.frame_maps(weights, LAYOUT)[0, 1, 1, 1] == 1


def test_same_place_is_at_distance_zero():
    weights = shifted(LAYOUT, 2, 0, 0)
    assert measures.mean_distance(weights, LAYOUT).eq(0).all()
    assert measures.preferred_offset(weights, LAYOUT).tolist() == [0, 0]
    assert measures.offset_mass(weights, LAYOUT)[3, 5] == 1


@pytest.mark.parametrize(("rows", "columns"), [(1, 0), (0, -2), (-3, 4)])
def test_shifted_weights_are_at_the_distance_and_offset_of_the_shift(rows, columns):
    weights = shifted(LAYOUT, 0, rows, columns)
    seeing = weights.sum(-1) > 0
    distance = measures.mean_distance(weights, LAYOUT)
    torch.testing.assert_close(distance[seeing], torch.full_like(distance[seeing], math.hypot(rows, columns)))
    assert distance[~seeing].isnan().all()
    assert measures.preferred_offset(weights[None, None], LAYOUT).tolist() == [[[rows, columns]]]
    mass = measures.offset_mass(weights, LAYOUT)
    torch.testing.assert_close(mass[3 + rows, 5 + columns], seeing.float().mean())
    assert mass.count_nonzero() == 1


def test_the_extra_key_does_not_weigh_in_distance():
    weights = torch.cat((0.5 * shifted(LAYOUT, 0, 0, 1), torch.full((N, 1), 0.5)), dim=-1)
    at_border = torch.arange(N) % 6 == 5
    torch.testing.assert_close(measures.mean_distance(weights, LAYOUT)[~at_border], torch.ones(20))
    torch.testing.assert_close(measures.extra_share(weights, LAYOUT), torch.full((N,), 0.5))


def test_a_row_that_saw_nothing_has_no_entropy_and_no_mass():
    weights = torch.zeros(N, M)
    assert measures.entropy(weights).eq(0).all()
    assert measures.frame_mass(weights, LAYOUT).eq(0).all()


def test_the_score_range_is_that_of_what_can_be_seen():
    scores = torch.tensor([[1.0, 4.0, -2.0], [3.0, -torch.inf, 2.5], [-torch.inf] * 3, [0.0, 200.0, 0.0]])
    torch.testing.assert_close(measures.score_range(scores), torch.tensor([6.0, 0.5, math.nan, 200.0]), equal_nan=True)


def test_the_score_range_is_the_logarithm_of_the_weights_ratio():
    scores = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0))
    weights = scores.softmax(-1)
    torch.testing.assert_close(measures.score_range(scores), (weights.amax(-1) / weights.amin(-1)).log())


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
