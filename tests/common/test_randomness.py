import torch

from cdit.common.randomness import generator, seed_of


def test_keys_of_any_length_and_order_differ():
    keys = [(0,), (1,), (0, 1), (1, 0), (1, 2, 3), (3, 2, 1), (2**40, 1)]
    assert len({seed_of(*key) for key in keys}) == len(keys)
    assert all(0 <= seed_of(*key) < 2**63 for key in keys)


def test_seeds_never_change():
    """Runs resume across releases only while a key means the same numbers."""
    assert seed_of(1, 2, 3) == 6_530_208_866_956_668_065
    assert generator(1, 2, 3).initial_seed() == 6_530_208_866_956_668_065


def test_neighbouring_keys_are_unrelated():
    keys = [(a, b, c) for a in range(10) for b in range(10) for c in range(10)]
    draws = torch.stack([torch.randn(200, generator=generator(*key)) for key in keys])
    assert len({seed_of(*key) for key in keys}) == 1000
    correlation = draws[:-1].mul(draws[1:]).mean(dim=1)
    assert correlation.abs().max() < 0.35  # five standard errors
    assert abs(draws.mean().item()) < 0.01
    torch.testing.assert_close(draws.std().item(), 1.0, atol=0.01, rtol=0)


def test_a_generator_is_its_keys_whatever_was_drawn_before():
    first = torch.rand(4, generator=generator(5, 6))
    torch.rand(3)
    generator(5, 7)
    assert torch.equal(torch.rand(4, generator=generator(5, 6)), first)
    assert not torch.equal(torch.rand(4, generator=generator(6, 5)), first)
