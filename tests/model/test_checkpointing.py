"""Activation checkpointing: the same numbers from less memory."""

import pytest
import torch
from dialects import DIALECTS, batch, build, masks
from torch import Tensor

from cdit.model import CDiT


def gradients(model: CDiT, bfloat16: bool = False, **inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output and every parameter's gradient of a loss in which all outputs matter differently."""
    torch.manual_seed(7)  # what dropout draws from
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        out = model(**inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    model.zero_grad()
    (weights * out.float() + 0.1 * out.float().square()).sum().backward()
    return out.detach(), [p.grad.clone() for p in model.parameters()]


def assert_equal(first: tuple[Tensor, list[Tensor]], second: tuple[Tensor, list[Tensor]], model: CDiT) -> None:
    """To the last bit; gradients that are all zero would prove nothing."""
    assert torch.equal(first[0], second[0])
    for (name, _), one, other in zip(model.named_parameters(), first[1], second[1], strict=True):
        assert torch.equal(one, other), name
        assert one.abs().max() > 0, name


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_outputs_and_gradients_are_bit_equal(dialect, bfloat16):
    model, data = build(dialect, dropout=0.3).train(), batch() | masks()
    plain = gradients(model, bfloat16, **data)
    model.enable_gradient_checkpointing()
    assert_equal(plain, gradients(model, bfloat16, **data), model)
    model.disable_gradient_checkpointing()
    assert_equal(plain, gradients(model, bfloat16, **data), model)
