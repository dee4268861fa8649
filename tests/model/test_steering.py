"""Queries that look elsewhere than where they stand, by closed forms."""

import pytest
import torch
from dialects import batch, build, call, masks
from torch import Tensor

from cdit.model.attention import Observation, Part
from cdit.model.blocks import Block
from cdit.model.rotary import axial_rotation

GRID = (5, 7)
HEADS = 2


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_zero_weights_are_the_unsteered_network():
    steered, plain, data = build("steered"), build("native"), batch() | masks()
    for block in steered.blocks:
        block.steering.linear.weight.zero_()
        block.steering.linear.bias.zero_()
    plain.load_state_dict({name: x for name, x in steered.state_dict().items() if "steering" not in name})
    torch.testing.assert_close(call(steered, **data), call(plain, **data), atol=1e-6, rtol=0)


def scores(moves: dict[int, tuple[float, float, float, float]]) -> Tensor:
    """Scores of one target, (H, rows, columns, M), its tokens all alike, where heads are moved by (o, z)."""
    torch.manual_seed(0)
    block = Block(32, HEADS, steering_grid=GRID)
    block.ada_ln.bias.normal_()
    block.steering.linear.weight.zero_()
    block.steering.linear.bias.zero_()
    for head, move in moves.items():
        block.steering.linear.bias[4 * head : 4 * head + 4] = torch.tensor(move)
    rows, columns = (torch.arange(side) for side in GRID)
    position = torch.stack(torch.meshgrid(torch.tensor([2]), rows, columns, indexing="ij"), -1).flatten(0, 2).float()
    rotation = axial_rotation(position, 16)
    past = block.project_kv(torch.randn(1, len(position), 32), axial_rotation(position - torch.tensor([1, 0, 0]), 16))
    seen: list[Observation] = []
    block.cross_attn.observer = seen.append
    tokens = torch.randn(32).expand(1, len(position), 32)
    block(tokens, torch.randn(1, 32), [Part(past)], rotation, position)
    return seen[0].scores()[0].unflatten(1, GRID)


def test_a_quarter_moves_a_head_by_one_patch():
    """4·o = 1: a query scores keys as the one a row (or a column) further does; the other head stays."""
    still, down, right = scores({}), scores({0: (0.25, 0, 0, 0)}), scores({1: (0, 0.25, 0, 0)})
    torch.testing.assert_close(down[0, :-1], still[0, 1:])
    torch.testing.assert_close(right[1, :, :-1], still[1, :, 1:])
    torch.testing.assert_close((down[1], right[0]), (still[1], still[0]))
    assert (down[0] - still[0]).abs().max() > 0.1


def test_a_large_zoom_doubles_the_distance_from_the_middle():
    """2^tanh(z) tends to 2 and to 1/2; rows and columns have a zoom each."""
    still, out, back = scores({}), scores({0: (0, 0, 20, 0)}), scores({0: (0, 0, 0, -20)})
    torch.testing.assert_close(out[0, 1:4], still[0, ::2])
    torch.testing.assert_close(back[0, :, 1::2], still[0, :, 2:5])
