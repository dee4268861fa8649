"""Every parameter's gradient against finite differences in float64."""

import pytest
import torch
from dialects import DIALECTS, batch, build, call, masks

H = 1e-5


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_parameter_has_the_gradient_of_a_finite_difference(dialect):
    model = build(dialect).double()
    data = batch(dtype=torch.float64) | masks()
    data["context"][1, 0] = float("nan")  # a missing frame: gradients must not notice
    data["action"][0, 1] = float("nan")  # an unknown action
    if model.config.context_noise:
        data["noise_level"] = torch.full((2, 3), 0.3)
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(call(model, **data).shape, generator=generator, dtype=torch.float64)

    def loss() -> torch.Tensor:
        out = call(model, **data)
        return (weights * out + 0.1 * out.square()).sum()

    def loss_at(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        parameter.copy_(value)
        return loss()

    loss().backward()
    with torch.no_grad():
        for name, p in model.named_parameters():
            assert p.grad is not None, name
            assert p.grad.abs().max() > 1e-6, name
            # along a random direction, and at the entry that matters most
            random = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            single = torch.zeros_like(p).flatten().scatter(0, p.grad.abs().argmax(), 1.0).view_as(p)
            for direction in (random / random.norm(), single):
                start = p.clone()
                above, below = (loss_at(p, start + side * H * direction) for side in (1, -1))
                p.copy_(start)
                slope = (above - below) / (2 * H)
                torch.testing.assert_close((p.grad * direction).sum(), slope, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_inputs_get_gradients_and_missing_ones_get_none(dialect):
    model, data, mask = build(dialect), batch(), masks()
    data["context"][1, 0] = float("nan")
    data["action"][0, 1] = float("nan")
    leaves = {name: data[name].requires_grad_() for name in ("sample", "action", "context")}
    call(model, **data, **mask).square().sum().backward()
    assert (leaves["sample"].grad != 0).any(dim=(-3, -2, -1)).all()
    per_frame = leaves["context"].grad
    assert per_frame.isfinite().all()
    assert ((per_frame != 0).any(dim=(-3, -2, -1)) == mask["context_mask"]).all()
    if model.config.use_action:
        assert ((leaves["action"].grad != 0).all(-1) == mask["action_mask"]).all()
