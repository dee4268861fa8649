"""Rotary positions against rotation by complex numbers, and the property they are used for."""

import math

import pytest
import torch

from cdit.model.rotary import THETA, Rotation, axial_rotation, rotate

K = 32  # sixteen pairs: four for the frame, six each for row and column


def grid(frames: int = 3, rows: int = 2, columns: int = 4) -> torch.Tensor:
    return torch.tensor(
        [(f, r, c) for f in range(frames) for r in range(rows) for c in range(columns)], dtype=torch.float32
    )


def draw(seed: int, tokens: int = 24) -> torch.Tensor:
    return torch.randn(2, 3, tokens, K, generator=torch.Generator().manual_seed(seed))


def scores(q: torch.Tensor, k: torch.Tensor, q_position: torch.Tensor, k_position: torch.Tensor) -> torch.Tensor:
    return rotate(q, axial_rotation(q_position, K)) @ rotate(k, axial_rotation(k_position, K)).transpose(-1, -2)


def test_a_pair_of_channels_turns_as_a_complex_number():
    x, position = draw(0), grid()
    turned = rotate(x, axial_rotation(position, K))
    frequencies = [[THETA ** (-i / (share - 1)) for i in range(share)] for share in (4, 6, 6)]
    for n, place in enumerate(position.tolist()):
        angles = [p * f for p, of_axis in zip(place, frequencies, strict=True) for f in of_axis]
        for i, angle in enumerate(angles):
            z = torch.complex(x[..., n, i], x[..., n, i + K // 2]) * complex(math.cos(angle), math.sin(angle))
            torch.testing.assert_close(turned[..., n, i], z.real, atol=1e-5, rtol=0)
            torch.testing.assert_close(turned[..., n, i + K // 2], z.imag, atol=1e-5, rtol=0)


def test_scores_depend_on_differences_only():
    q, k, position = draw(0), draw(1), grid()
    before = scores(q, k, position, position)
    shift = torch.tensor([5.0, -3.0, 11.0])
    torch.testing.assert_close(scores(q, k, position + shift, position + shift), before, atol=1e-4, rtol=0)
    assert (scores(q, k, position + shift, position) - before).abs().max() > 1  # and they do depend on those


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["frame", "row", "column"])
def test_every_axis_matters_and_by_itself(axis):
    """One step along an axis turns that axis' channels and no other."""
    step = torch.zeros(1, 3)
    step[0, axis] = 1
    cos, sin = axial_rotation(step, K)
    moved = torch.arange(K // 2)[sin[0] != 0].tolist()
    assert moved == [list(range(4)), list(range(4, 10)), list(range(10, 16))][axis]
    assert (cos[0, [i for i in range(K // 2) if i not in moved]] == 1).all()


@pytest.mark.parametrize("head_width", [6, 8, 12, 18, 24, 64])
def test_every_even_head_width_of_six_or_more_tells_all_places_apart(head_width):
    rotation = axial_rotation(grid(4, 8, 8), head_width)
    assert rotation.cos.shape == rotation.sin.shape == (4 * 8 * 8, head_width // 2)
    angles = torch.cat(rotation, dim=-1)
    distances = torch.cdist(angles, angles) + torch.eye(len(angles))
    assert distances.min() > 1e-3


def test_lengths_are_kept_and_none_leaves_everything():
    x = draw(0)
    torch.testing.assert_close(rotate(x, axial_rotation(grid(), K)).norm(dim=-1), x.norm(dim=-1))
    assert rotate(x, None) is x
    assert rotate(x.bfloat16(), Rotation(*axial_rotation(grid(), K))).dtype == torch.bfloat16
