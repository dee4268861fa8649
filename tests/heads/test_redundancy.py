import math

import pytest
import torch

from cdit.heads.redundancy import head_distances


def test_equal_heads_are_at_zero_and_disjoint_ones_at_one():
    weights = torch.zeros(4, 5, 6)
    weights[0, :, 0] = weights[1, :, 0] = 1
    weights[2, :, 1:3] = 0.5
    weights[3, :, 5] = 1
    expected = torch.ones(4, 4) - torch.eye(4)
    expected[0, 1] = expected[1, 0] = 0
    assert torch.equal(head_distances(weights), expected)


def test_equal_heads_are_at_zero_exactly_whatever_they_hold():
    row = torch.rand(7, 50, generator=torch.Generator().manual_seed(1)).softmax(-1)
    assert torch.equal(head_distances(torch.stack((row, row))), torch.zeros(2, 2))


@pytest.mark.parametrize("share", [0.5, 0.1, 0.9])
def test_a_mixture_is_as_far_as_its_closed_form(share):
    """p = (1, 0) against q = (1 - a, a): JSD = h(a / 2) - h(a) / 2 with the binary entropy h in bits."""

    def h(a: float) -> float:
        return -a * math.log2(a) - (1 - a) * math.log2(1 - a)

    weights = torch.tensor([[[1.0, 0.0]], [[1 - share, share]]])
    expected = math.sqrt(h(share / 2) - h(share) / 2)
    assert head_distances(weights)[0, 1].item() == pytest.approx(expected, rel=1e-5)


def test_uniform_against_one_hot():
    tokens = 16
    weights = torch.stack((torch.full((3, tokens), 1 / tokens), torch.eye(tokens)[:3]))
    # By the definition: half of the two Kullback–Leibler divergences from the mean.
    top = (1 + 1 / tokens) / 2
    divergence = 0.5 * math.log2(1 / top) + 0.5 * (
        1 / tokens * math.log2(1 / tokens / top) + (tokens - 1) / tokens * math.log2(2)
    )
    assert head_distances(weights)[0, 1].item() == pytest.approx(math.sqrt(divergence), rel=1e-5)


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
