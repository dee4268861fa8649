import torch

from cdit.heads.value_weighted import given_norms, value_weighted


def test_norms_are_those_of_what_each_head_alone_would_add():
    draws = torch.Generator().manual_seed(0)
    values = torch.randn(2, 3, 5, 4, generator=draws)  # 3 heads of width 4
    whole = torch.randn(12, 12, generator=draws)  # W_O
    maps = whole.unflatten(1, (3, 4)).transpose(0, 1)
    norms = given_norms(values, maps)
    for sample, head, token in [(0, 0, 0), (1, 2, 4), (1, 1, 3)]:
        alone = torch.zeros(12)
        alone[4 * head : 4 * head + 4] = values[sample, head, token]
        torch.testing.assert_close(norms[sample, head, token], torch.linalg.vector_norm(whole @ alone))


def test_equal_norms_change_nothing():
    weights = torch.rand(2, 6, 9).softmax(-1)
    torch.testing.assert_close(value_weighted(weights, torch.full((2, 9), 3.0)), weights)


def test_what_is_moved_is_shared_out_by_weight_times_norm():
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]])
    norms = torch.tensor([1.0, 6.0, 0.0])  # the last token is a sink that gives nothing
    expected = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(value_weighted(weights, norms), expected)
